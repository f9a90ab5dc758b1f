// Importing speedrun._C loads this library, whose static initialisers register the CUDA operators.
// The module holds one string, `source_hashes`: as JSON, what each kernel was built from.
#include <Python.h>

#include "source_hashes.h"  // made by source_hashes.py in the build folder

PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  PyObject* module = PyModule_Create(&definition);
  if (module && PyModule_AddStringConstant(module, "source_hashes", kSourceHashes) < 0) {
    Py_DECREF(module);
    return nullptr;
  }
  return module;
}
