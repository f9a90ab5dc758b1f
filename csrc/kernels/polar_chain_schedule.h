// What a chain of products consists of, which thread block computes which square of it, and what
// each square waits for. Pure functions of sizes, without CUDA: csrc/tests/polar_chain_test.cpp
// runs them.
#pragma once

#include <cstdint>

#include "common/int_math.h"
#include "kernels/sym_matmul_tiles.h"

namespace speedrun {

constexpr int kMaxChainSteps = 8;
constexpr int64_t kMaxChainN = 1 << 16;  // within what tensor maps and 32-bit numbers can count

// The workspace has a slot for every matrix that a chain computes, so that none is ever written
// twice: four a step, but for the last, which has no P. Slot 0, R of the first step, is given.
enum ChainMatrix { kChainR, kChainZ, kChainQ, kChainP };
constexpr int chain_slot(int step, ChainMatrix matrix) { return 4 * step + matrix; }
constexpr int chain_slots(int num_steps) { return 4 * num_steps - 1; }
constexpr int chain_products(int num_steps) { return 4 * num_steps - 3; }

// out = alpha · A · B + beta · C, by slots; and where `shifted` is one, shifted = out + shift · I.
struct ChainProduct {
  int a, b, c, out, shifted;
  float alpha, beta, shift;
};

struct Chain {
  int num_products;
  ChainProduct products[chain_products(kMaxChainSteps)];
};

// In an order in which each product comes after those that it needs. Q, which nothing in its own
// step waits for, is put where thread blocks would wait for the last squares of P.
inline Chain make_chain(int num_steps, const double (*coefficients)[3]) {
  constexpr int kNone = -1;
  Chain chain{};
  const auto append = [&](const ChainProduct& product) {
    chain.products[chain.num_products++] = product;
  };
  for (int step = 0; step < num_steps; ++step) {
    const auto a = static_cast<float>(coefficients[step][0]);
    const auto b = static_cast<float>(coefficients[step][1]);
    const auto c = static_cast<float>(coefficients[step][2]);
    const int r = chain_slot(step, kChainR), z = chain_slot(step, kChainZ);
    const int q = chain_slot(step, kChainQ), p = chain_slot(step, kChainP);
    append({r, r, r, z, step == 0 ? q : kNone, c, b, a});
    if (step + 1 < num_steps) append({r, z, r, p, kNone, 1.f, a, 0.f});
    const int last_q = chain_slot(step - 1, kChainQ);
    if (step > 0) append({last_q, z, last_q, q, kNone, 1.f, a, 0.f});
    const int next_r = chain_slot(step + 1, kChainR);
    if (step + 1 < num_steps) append({z, p, p, next_r, kNone, 1.f, a, 0.f});
  }
  return chain;
}

// A square, on the diagonal or below it, of a product for one matrix of the bank.
struct ChainItem {
  int product, matrix;
  Square square;
};

// Thread block g of G takes the items g, g + G, g + 2 G, …, in this order. They are numbered
// product by product, and an item needs only items of earlier products: of all unfinished items the
// first has all that it waits for, and its block, done with the block's smaller numbers, is at it.
// So a chain ends with any G >= 1, if all G blocks run at once or those that run finish.
HOST_DEVICE inline ChainItem chain_item(int index, int batch, int side) {
  const int squares = static_cast<int>(triangle_size(side)), of_bank = squares * batch;
  return {index / of_bank, index % of_bank / squares, square_at(index % squares)};
}

// A row of squares of each of a slot's matrices.
struct ChainPanel {
  int slot, row;
};

// An item reads rows of A and of B, which is symmetric: panel 0 and panel 1. C's square lies in one
// of them, as C is A or, mirrored, B; what stores a square stores its mirror image, too.
HOST_DEVICE inline ChainPanel operand_panel(const ChainProduct& product, const Square& square,
                                            int operand) {
  return operand == 0 ? ChainPanel{product.a, square.row} : ChainPanel{product.b, square.col};
}

// Where the number of a panel's finished squares is counted: complete at `side`, but in slot 0,
// which is complete from the start and isn't counted. Counters: (slots, batch, side).
HOST_DEVICE inline int panel_counter(const ChainPanel& panel, int matrix, int batch, int side) {
  return (panel.slot * batch + matrix) * side + panel.row;
}

}  // namespace speedrun
