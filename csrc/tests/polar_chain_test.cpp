// The schedule of polar_chain, run by a simulation: for the record's banks, chains of 1 to 8 steps
// and any number of thread blocks, at speeds that chance decides. What is proved: everything that
// an item reads is awaited and written, nothing is written twice, nothing waits for ever, and the
// tiles' arithmetic gives the plain products', to the last bit.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>
#include <set>
#include <tuple>
#include <vector>

#include "kernels/polar_chain_schedule.h"
#include "tests/check.h"

namespace speedrun {
namespace {

struct Bank {
  int batch, side;  // side: squares along n
};
// An eighth of the record's banks, and whole: n = 768 and n = 256; one square; an odd number.
constexpr Bank kBanks[] = {{3, 6}, {24, 6}, {8, 2}, {64, 2}, {1, 1}, {2, 5}};
constexpr double kCoefficients[kMaxChainSteps][3] = {
    {8.156, -22.48, 15.88},  {4.043, -2.809, 0.5},   {3.892, -2.772, 0.506},
    {3.286, -2.368, 0.4645}, {2.347, -1.71, 0.4232}, {1.891, -1.245, 0.3748},
    {1.876, -1.251, 0.375},  {1.875, -1.25, 0.375}};

using Place = std::tuple<int, int, int, int>;  // slot, matrix, row and column of squares

// Squares that an item reads: a row of A's, a row of B's, and C's own.
std::vector<Place> reads_of(const ChainProduct& product, const ChainItem& item, int side) {
  std::vector<Place> reads{{product.c, item.matrix, item.square.row, item.square.col}};
  for (int k = 0; k < side; ++k) {
    reads.emplace_back(product.a, item.matrix, item.square.row, k);
    reads.emplace_back(product.b, item.matrix, item.square.col, k);
  }
  return reads;
}

std::vector<Place> writes_of(const ChainProduct& product, const ChainItem& item) {
  std::vector<Place> writes;
  for (const int slot : {product.out, product.shifted}) {
    if (slot < 0) continue;
    writes.emplace_back(slot, item.matrix, item.square.row, item.square.col);
    if (item.square.row != item.square.col) {
      writes.emplace_back(slot, item.matrix, item.square.col, item.square.row);
    }
  }
  return writes;
}

// What the kernel's counters are: how many squares of each panel are there.
class Counters {
 public:
  Counters(const Bank& bank, int num_steps)
      : bank_(bank), counts_(chain_slots(num_steps) * bank.batch * bank.side) {}

  bool are_complete(const ChainProduct& product, const ChainItem& item) const {
    for (const int operand : {0, 1}) {
      const ChainPanel panel = operand_panel(product, item.square, operand);
      if (panel.slot != 0 && counts_[at(panel, item.matrix)] < bank_.side) return false;
    }
    return true;
  }

  void add(const ChainProduct& product, const ChainItem& item) {
    for (const Place& place : writes_of(product, item)) {
      ++counts_[at({std::get<0>(place), std::get<2>(place)}, item.matrix)];
    }
  }

  // Slot 0 isn't counted; all others are full, which would show one that is counted too often.
  void check_end() const {
    for (int i = 0; i < static_cast<int>(counts_.size()); ++i) {
      CHECK(counts_[i] == (i < bank_.batch * bank_.side ? 0 : bank_.side));
    }
  }

 private:
  int at(const ChainPanel& panel, int matrix) const {
    return panel_counter(panel, matrix, bank_.batch, bank_.side);
  }

  Bank bank_;
  std::vector<int> counts_;
};

// Runs a chain with `num_blocks` thread blocks, of which any that isn't waiting goes on: all orders
// that a GPU may take are among those that chance finds. `compute` gets each item in its turn.
template <class Compute>
void run(const Bank& bank, int num_steps, int num_blocks, std::mt19937& random, Compute compute) {
  const Chain chain = make_chain(num_steps, kCoefficients);
  CHECK(chain.num_products == chain_products(num_steps));
  const int squares = static_cast<int>(triangle_size(bank.side));
  const int num_items = chain.num_products * bank.batch * squares;
  Counters counters(bank, num_steps);
  std::set<Place> written;
  for (int matrix = 0; matrix < bank.batch; ++matrix) {
    for (int row = 0; row < bank.side; ++row) {
      for (int col = 0; col < bank.side; ++col) written.emplace(0, matrix, row, col);
    }
  }
  std::vector<int> next, running;
  for (int block = 0; block < num_blocks; ++block) {
    next.push_back(block);
    if (block < num_items) running.push_back(block);
  }
  while (!running.empty()) {
    std::shuffle(running.begin(), running.end(), random);
    bool moved = false;
    for (size_t i = 0; i < running.size() && !moved; ++i) {
      int& index = next[running[i]];
      const ChainItem item = chain_item(index, bank.batch, bank.side);
      const ChainProduct& product = chain.products[item.product];
      if (!counters.are_complete(product, item)) continue;
      for (const Place& place : reads_of(product, item, bank.side)) CHECK(written.count(place));
      compute(product, item);
      for (const Place& place : writes_of(product, item)) CHECK(written.insert(place).second);
      counters.add(product, item);
      moved = true;
      index += num_blocks;
      if (index >= num_items) running.erase(running.begin() + i);
    }
    CHECK(moved);  // else all of them wait
  }
  counters.check_end();
  const size_t per_slot = size_t{1} * bank.batch * bank.side * bank.side;
  CHECK(written.size() == per_slot * chain_slots(num_steps));
}

void test_schedules() {
  std::mt19937 random(1);
  for (const Bank& bank : kBanks) {
    for (const int num_steps : {1, 2, 3, kMaxChainSteps}) {
      if (bank.batch > 8 && num_steps > 3) continue;  // the record's have 2 and 3
      for (const int num_blocks : {1, 2, 61, 132, 1000}) {
        run(bank, num_steps, num_blocks, random, [](const ChainProduct&, const ChainItem&) {});
      }
    }
  }
}

// ---- Arithmetic ------------------------------------------------------------------------------

// To the nearest number with fp16's 11 bits, ties to even.
double rounded(double x) {
  int exponent;
  std::frexp(x, &exponent);
  const double unit = std::ldexp(1.0, std::max(exponent, -13) - 11);
  return std::nearbyint(x / unit) * unit;
}

using Matrices = std::vector<double>;  // (batch, n, n)

// The header's formula, of whole matrices; the lower triangle counts.
Matrices product_of(const Matrices& a, const Matrices& b, const Matrices& c, int batch, int n,
                    double alpha, double beta) {
  Matrices out(a.size());
  for (int matrix = 0; matrix < batch; ++matrix) {
    const size_t start = size_t{1} * matrix * n * n;
    for (int row = 0; row < n; ++row) {
      for (int col = 0; col <= row; ++col) {
        double sum = 0;
        for (int k = 0; k < n; ++k) sum += a[start + row * n + k] * b[start + k * n + col];
        const double value = rounded(alpha * sum + beta * c[start + row * n + col]);
        out[start + row * n + col] = out[start + col * n + row] = value;
      }
    }
  }
  return out;
}

// Q of the steps as polar_chain.h states them.
Matrices plain_chain(Matrices r, int num_steps, int batch, int n) {
  Matrices q;
  for (int step = 0; step < num_steps; ++step) {
    const auto a = static_cast<float>(kCoefficients[step][0]);
    const auto b = static_cast<float>(kCoefficients[step][1]);
    const auto c = static_cast<float>(kCoefficients[step][2]);
    const Matrices z = product_of(r, r, r, batch, n, c, b);
    if (step == 0) {
      q = z;
      for (int i = 0; i < batch * n; ++i) {
        double& diagonal = q[size_t{1} * i * n + i % n];
        diagonal = rounded(diagonal + a);
      }
    } else {
      q = product_of(q, z, q, batch, n, 1, a);
    }
    if (step + 1 < num_steps) {
      const Matrices p = product_of(r, z, r, batch, n, 1, a);
      r = product_of(z, p, p, batch, n, 1, a);
    }
  }
  return q;
}

// One item as the kernel computes it: rows of A by rows of B, of a square on the diagonal the lower
// half, all stored mirrored.
void compute_square(std::vector<Matrices>& work, const ChainProduct& product, const ChainItem& item,
                    int n) {
  const size_t start = size_t{1} * item.matrix * n * n;
  const int top = item.square.row * kSquare, left = item.square.col * kSquare;
  for (int row = top; row < top + kSquare; ++row) {
    for (int col = left; col < left + kSquare; ++col) {
      if (item.square.row == item.square.col && row < col) continue;
      double sum = 0;
      for (int k = 0; k < n; ++k) {
        sum += work[product.a][start + row * n + k] * work[product.b][start + col * n + k];
      }
      const double added = product.beta * work[product.c][start + row * n + col];
      const double value = rounded(product.alpha * sum + added);
      const size_t place = start + row * n + col, mirror = start + col * n + row;
      work[product.out][place] = work[product.out][mirror] = value;
      if (product.shifted < 0) continue;
      const double shifted = row == col ? rounded(value + product.shift) : value;
      work[product.shifted][place] = work[product.shifted][mirror] = shifted;
    }
  }
}

void test_arithmetic() {
  constexpr int kSteps = 3;
  constexpr Bank kBank{1, 2};
  constexpr int n = kBank.side * kSquare;
  std::mt19937 random(2);
  std::normal_distribution<double> normal;
  Matrices x(n * n), r(n * n);
  for (double& value : x) value = normal(random) / n;  // norm 1
  for (int row = 0; row < n; ++row) {
    for (int col = 0; col <= row; ++col) {
      double sum = 0;
      for (int k = 0; k < n; ++k) sum += x[row * n + k] * x[col * n + k];
      r[row * n + col] = r[col * n + row] = rounded(sum);
    }
  }
  const Matrices expected = plain_chain(r, kSteps, kBank.batch, n);
  std::vector<Matrices> work(chain_slots(kSteps), Matrices(r.size(), NAN));
  work[0] = r;
  run(kBank, kSteps, 5, random, [&](const ChainProduct& product, const ChainItem& item) {
    compute_square(work, product, item, n);
  });
  double largest = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    CHECK(work.back()[i] == expected[i]);
    largest = std::max(largest, std::abs(expected[i]));
  }
  CHECK(largest > 1 && largest < 1000);  // neither nothing nor an overflow
}

void test_rounding() {
  for (const double exact : {0.0, 1.0, -0.5, 65504.0, 0x1p-24, 0x1.ff8p-15}) {
    CHECK(rounded(exact) == exact);
  }
  CHECK(rounded(1 + 0x1p-11) == 1 && rounded(1 + 0x1.8p-10) == 1 + 0x1p-9);  // ties
  CHECK(rounded(0x1.4p-24) == 0x1p-24 && rounded(0x1p-26) == 0);             // subnormal
}

}  // namespace
}  // namespace speedrun

int main() {
  speedrun::test_schedules();
  speedrun::test_rounding();
  speedrun::test_arithmetic();
  std::puts("polar_chain: all that is read is awaited, and no schedule stops");
}
