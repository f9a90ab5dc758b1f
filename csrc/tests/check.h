// What the test programs assert with.
#pragma once

#include <cstdio>
#include <cstdlib>

// An assert that NDEBUG keeps.
#define CHECK(condition)                                                           \
  do {                                                                             \
    if (!(condition)) {                                                            \
      std::fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                                \
    }                                                                              \
  } while (false)
