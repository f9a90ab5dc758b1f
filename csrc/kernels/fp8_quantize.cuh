// What the kernels of fp8_quantize share: a tile is read, cast, and stored in both layouts.
#pragma once

#include <cuda_fp8.h>

#include <climits>

#include "common/ieee.cuh"
#include "common/int_math.h"
#include "common/vec.cuh"

namespace speedrun::fp8_cast {

// Tile choice. Not yet measured on a GPU: the reasons here are arithmetic, for H100.
// A tile is kRowBlocks x kColVecs squares of 16 x 16 elements, so 16-byte vectors of fp8 in both
// layouts; four threads a square. A thread casts 4 vectors (rows kRowsPerPass apart), which are
// 8 loads of 16 bytes in flight for bf16, and transposes 16 rows of one word (4 columns).
template <int kRowBlocks_, int kColVecs_>
struct Tile {
  static constexpr int kRowBlocks = kRowBlocks_, kColVecs = kColVecs_;
  static constexpr int kRows = 16 * kRowBlocks, kCols = 16 * kColVecs;
  static constexpr int kThreads = 4 * kRowBlocks * kColVecs;
  static constexpr int kRowsPerPass = 4 * kRowBlocks;
  static constexpr int kVecs = kRows * kColVecs;  // of shared memory
};
constexpr int kPasses = 4;

// 128 x 128: rows of a 128-byte line in both layouts.
using QuantizeTile = Tile<8, 8>;

HOST_DEVICE inline float round_to_bf16(float x) { return to_float(from_float<__nv_bfloat16>(x)); }

// 16 elements of a row in each of the passes.
template <typename T>
struct Rows {
  static constexpr int kVecs = 16 / Vec<T>::kSize;
  Vec<T> vecs[kPasses][kVecs];

  HOST_DEVICE void get(int pass, float (&values)[16]) const {
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      values[i] = to_float(vecs[pass][i / Vec<T>::kSize].get(i % Vec<T>::kSize));
    }
  }
};

// Row of the tile that `thread` casts in `pass`; its columns start at thread % kColVecs * 16.
template <typename S>
HOST_DEVICE inline int row_of(int thread, int pass) {
  return thread / S::kColVecs + pass * S::kRowsPerPass;
}

template <typename S, bool kAligned, typename T>
HOST_DEVICE inline Rows<T> load_rows(const T* x, int64_t row_stride, int64_t rows_left,
                                     int64_t cols_left, int thread) {
  Rows<T> rows;
  const int col = thread % S::kColVecs * 16;
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    const int row = row_of<S>(thread, pass);
    const int64_t count = row < rows_left ? cols_left - col : 0;
#pragma unroll
    for (int i = 0; i < Rows<T>::kVecs; ++i) {
      const int start = i * Vec<T>::kSize;
      rows.vecs[pass][i] = load_vec<kAligned>(x + row * row_stride + col + start, count - start);
    }
  }
  return rows;
}

// Greatest |x| as fp32 bits, whose order as integers is that of the numbers, NaN above all.
template <typename T>
HOST_DEVICE inline uint32_t max_bits(const Rows<T>& rows) {
  uint32_t greatest = 0;
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    float values[16];
    rows.get(pass, values);
#pragma unroll
    for (float value : values) {
      const uint32_t bits = std::bit_cast<uint32_t>(value) & 0x7fffffff;
      greatest = bits > greatest ? bits : greatest;
    }
  }
  return greatest;
}

template <bool kE4M3>
HOST_DEVICE inline Vec<uint8_t> to_fp8(const float (&values)[16]) {
  constexpr __nv_fp8_interpretation_t kType = kE4M3 ? __NV_E4M3 : __NV_E5M2;
  Vec<uint8_t> codes{};
#pragma unroll
  for (int i = 0; i < 8; ++i) {  // two a conversion, the first in the low byte
    const float2 pair = make_float2(values[2 * i], values[2 * i + 1]);
    const uint32_t both = __nv_cvt_float2_to_fp8x2(pair, __NV_SATFINITE, kType);
    codes.words[i / 2] |= both << (i % 2 * 16);
  }
  return codes;
}

// Vector `vec` of row `row` of a tile in shared memory: without bank conflicts for a row, and for
// words of one or two columns of vectors in neighbouring blocks of 16 rows.
template <typename S>
HOST_DEVICE inline int place(int row, int vec) {
  return row * S::kColVecs + swizzle(row / 16 * (8 / S::kRowBlocks), vec);
}

// Where a tile's outputs go, and what is left of the matrix from its corner on.
struct Target {
  uint8_t *out, *out_t;  // at the corner; each may be null
  int64_t out_row_stride, out_t_row_stride;
  int64_t rows_left, cols_left;

  HOST_DEVICE Target(uint8_t* out, uint8_t* out_t, int64_t matrix, int64_t rows, int64_t cols,
                     int64_t row, int64_t col)
      : out(out ? out + matrix * rows * cols + row * cols + col : nullptr),
        out_t(out_t ? out_t + matrix * rows * cols + col * rows + row : nullptr),
        out_row_stride(cols),
        out_t_row_stride(rows),
        rows_left(rows - row),
        cols_left(cols - col) {}
};

// Phase 1: casts what `quotients(pass, values)` makes of the rows; to `out`, and to the tile.
template <typename S, bool kE4M3, bool kAligned, typename T, typename F>
HOST_DEVICE inline void cast_rows(const Rows<T>& rows, const F& quotients, const Target& t,
                                  int thread, Vec<uint8_t>* tile) {
  const int vec = thread % S::kColVecs;
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    const int row = row_of<S>(thread, pass);
    float values[16];
    rows.get(pass, values);
    quotients(pass, values);
    const Vec<uint8_t> codes = to_fp8<kE4M3>(values);
    if (t.out) {
      store_vec<kAligned>(row_start<kAligned>(t.out, row, t.out_row_stride) + vec * 16, codes,
                          row < t.rows_left ? t.cols_left - vec * 16 : 0);
    }
    if (t.out_t) store16(&tile[place<S>(row, vec)], codes);
  }
}

// Phase 2: transposes 16 rows of 4 columns of the tile; neighbouring threads have neighbouring
// rows.
template <typename S, bool kAligned>
HOST_DEVICE inline void store_transposed(const Vec<uint8_t>* tile, const Target& t, int thread) {
  const int row = thread % S::kRowBlocks * 16, word = thread / S::kRowBlocks;
  Vec<uint8_t> columns[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    uint32_t words[4];
#pragma unroll
    for (int j = 0; j < 4; ++j)
      words[j] = tile[place<S>(row + 4 * i + j, word / 4)].words[word % 4];
    transpose_words(words);
#pragma unroll
    for (int j = 0; j < 4; ++j) columns[j].words[i] = words[j];
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int col = word * 4 + j;
    store_vec<kAligned>(row_start<kAligned>(t.out_t, col, t.out_t_row_stride) + row, columns[j],
                        col < t.cols_left ? t.rows_left - row : 0);
  }
}

// What cast_rows casts: x / scale, with the quotient rounded to bf16 first if kToBf16.
template <bool kToBf16>
struct Quotients {
  float scale;

  HOST_DEVICE void operator()(int, float (&values)[16]) const {
#pragma unroll
    for (float& value : values) {
      value = divide(value, scale);
      if constexpr (kToBf16) value = round_to_bf16(value);
    }
  }
};

// Number of blocks, 0 if there are more than a grid can have.
inline unsigned grid_size(int64_t batch, int64_t row_tiles, int64_t col_tiles) {
  if (row_tiles > INT_MAX / col_tiles || row_tiles * col_tiles > INT_MAX / batch) return 0;
  return static_cast<unsigned>(batch * row_tiles * col_tiles);
}

// Of the outputs (..., rows, cols) and (..., cols, rows) of fp8.
inline bool outputs_are_aligned(const void* out, const void* out_t, int64_t rows, int64_t cols) {
  return is_aligned(out, cols, cols, 0, 1) && (!out_t || is_aligned(out_t, rows, rows, 0, 1));
}

}  // namespace speedrun::fp8_cast
