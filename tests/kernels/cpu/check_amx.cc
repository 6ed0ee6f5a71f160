// The kernels for AMX on its own registers, in a process that Linux lends them to: exits with 0 if
// they are chosen when they may be, and multiply as the scalar kernels do, from threads as well.
//
// emulate_amx.sh runs it on an emulated CPU; any Linux on a CPU with AMX will do.
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cmath>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <future>
#include <string>
#include <thread>

#include "isa/amx_tiles.h"
#include "operator.h"
#include "panel_operands.h"

namespace qcompile::cpu {
namespace {

bool passed = true;

void Report(const std::string& what, bool as_expected) {
  std::printf("%s  %s\n", as_expected ? "ok  " : "FAIL", what.c_str());
  std::fflush(stdout);
  passed = passed && as_expected;
}

// What a child process that runs `body` ends with, as waitpid says it.
int StatusOf(const std::function<int()>& body) {
  const pid_t child = fork();
  if (child == 0) _exit(body());
  int status = 0;
  waitpid(child, &status, 0);
  return status;
}

std::string Chosen(const char* wanted) {
  setenv("QCOMPILE_CPU_ISA", wanted, 1);
  std::string name;
  try {
    name = SelectKernels().name;
  } catch (const OperatorError& error) {
    name = error.what();
  }
  unsetenv("QCOMPILE_CPU_ISA");
  return name;
}

// --- Permission and choice ---

void CheckPermission() {
  const int refused = StatusOf([] {
    AmxTiles tiles;
    tiles.Zero<0>();
    return 0;
  });
  Report("tiles are refused to a process that did not ask for them",
         WIFSIGNALED(refused) && WTERMSIG(refused) == SIGILL);
  // Linux does not lend tiles to processes with a signal stack that they would not fit on.
  const int crowded = StatusOf([] {
    static char memory[8192];
    const stack_t stack = {memory, 0, sizeof(memory)};
    if (sigaltstack(&stack, nullptr) != 0) return 2;
    return std::strcmp(SelectKernels().name, "avx512") == 0 ? 0 : 1;
  });
  Report("without permission AVX-512 is chosen", WIFEXITED(crowded) && WEXITSTATUS(crowded) == 0);
}

void CheckChoice() {
  Report("AMX is chosen", std::strcmp(SelectKernels().name, "amx") == 0);
  // In a child each: where there are no tiles, they are fatal.
  const int bytes =
      StatusOf([] { return PanelsMultiplyLike(*kAmxKernels.panels, kAvx512Kernels) ? 0 : 1; });
  Report("its int8 panels pass the self test", bytes == 0);
  const int floats = StatusOf(
      [] { return FloatPanelsMultiplyLike(*kAmxKernels.float_panels, kAvx512Kernels) ? 0 : 1; });
  Report("its float panels pass the self test", floats == 0);
  for (const char* name : {"amx", "avx512", "avxvnni", "avx2", "scalar"}) {
    Report(std::string("QCOMPILE_CPU_ISA=") + name, Chosen(name) == name);
  }
}

// --- Products ---

// The scales of a group: powers of two.
void WriteScales(const PackedLayout& layout, uint8_t* head, int64_t group) {
  for (int64_t c = 0; c < kColumns; ++c) {
    const int exponent = static_cast<int>((c + group) % 4);
    const float scale = std::ldexp(1.0f, -3 - exponent);
    uint32_t bits;
    std::memcpy(&bits, &scale, sizeof(bits));
    const auto upper = static_cast<uint16_t>(bits >> 16);
    const auto half = static_cast<uint16_t>((15 - 3 - exponent) << 10);
    switch (layout.scale_type) {
      case ScaleType::kFloat32:
        std::memcpy(head + c * sizeof(scale), &scale, sizeof(scale));
        break;
      case ScaleType::kFloat16:
        std::memcpy(head + c * sizeof(half), &half, sizeof(half));
        break;
      case ScaleType::kBfloat16:
        std::memcpy(head + c * sizeof(upper), &upper, sizeof(upper));
        break;
      case ScaleType::kE8m0:
        head[c] = static_cast<uint8_t>(bits >> 23);
        break;
      case ScaleType::kE4m3:
        head[c] = static_cast<uint8_t>(exponent << 3);
        break;
      case ScaleType::kUint8:
        head[c] = static_cast<uint8_t>(1 << exponent);
    }
  }
}

// Scales that are powers of two, as their products are exact: the scalar kernels do not fuse them
// with the sums. And levels and outer scales, where there are any.
void WriteNumbers(Operands* operands) {
  const PackedLayout& layout = operands->layout;
  uint8_t* levels = operands->weight.data();
  const auto write = [](uint8_t* to, float number) { std::memcpy(to, &number, sizeof(number)); };
  for (int64_t i = 0; i < layout.level_bytes() / int64_t{sizeof(float)}; ++i) {
    write(levels + i * sizeof(float), std::sin(static_cast<float>(i)));
  }
  for (int64_t block = 0; block < layout.column_blocks(); ++block) {
    uint8_t* outer = levels + layout.outer_scales_at(block);
    for (int64_t c = 0; c < kColumns && layout.outer_scale_bytes() > 0; ++c) {
      write(outer + c * sizeof(float), 1.0f / 64.0f);
    }
    for (int64_t g = 0; g < layout.groups(); ++g) WriteScales(layout, operands->Head(block, g), g);
  }
  for (size_t i = 0; i < operands->scales.size(); ++i) {
    operands->scales[i] = std::ldexp(1.0f, -static_cast<int>(i % 5));
  }
}

std::string Text(const PackedLayout& l, int64_t rows) {
  constexpr const char* kCodings[] = {"integer", "table", "e2m1", "e4m3", "ternary"};
  return std::string(kCodings[static_cast<int>(l.coding)]) + " " + std::to_string(l.bits) +
         " bits, " + (l.float_zero_point ? "float " : "") +
         (l.has_zero_point ? "zero points, " : "") + "groups of " + std::to_string(l.group_size) +
         ", scales of type " + std::to_string(static_cast<int>(l.scale_type)) + ", " +
         std::to_string(l.n) + " x " + std::to_string(l.k) + ", " + std::to_string(rows) + " rows";
}

// Inner sizes, columns and rows that are no whole number of tiles, panels or column blocks.
struct Sizes {
  int64_t n, k, rows;
};
constexpr Sizes kSizes[] = {{40, 200, 45}, {17, 131, 33}, {33, 1091, 31}};

template <class Body>
void ForEachLayout(bool bytes_only, Body body) {
  constexpr ScaleType kTypes[] = {ScaleType::kFloat32, ScaleType::kFloat16, ScaleType::kBfloat16,
                                  ScaleType::kE8m0,    ScaleType::kE4m3,    ScaleType::kUint8};
  size_t turn = 0;
  const auto each = [&](Coding coding, int bits, bool zeros, bool float_zeros = false) {
    for (const int64_t group : {16, 32, 64, 128, 0}) {
      for (const Sizes& sizes : kSizes) {
        const ScaleType type = kTypes[turn++ % std::size(kTypes)];
        const int64_t length = group == 0 ? sizes.k : group;
        body({sizes.n, sizes.k, length, bits, zeros, type, coding, float_zeros}, sizes.rows);
      }
    }
  };
  for (int bits = 1; bits <= 8; ++bits) {
    each(Coding::kInteger, bits, false);
    each(Coding::kInteger, bits, true);
    each(Coding::kInteger, bits, true, true);
    if (!bytes_only) each(Coding::kTable, bits, false);
  }
  each(Coding::kE2m1, 4, false);
  each(Coding::kTernary, 2, false);
  if (!bytes_only) each(Coding::kE4m3, 8, false);
}

void CheckInt8() {
  int64_t products = 0, wrong = 0;
  ForEachLayout(true, [&](const PackedLayout& layout, int64_t rows) {
    Operands operands(layout, rows);
    WriteNumbers(&operands);
    std::vector<float> expected(static_cast<size_t>(rows * layout.n)), actual(expected);
    for (const int64_t scales_per_row : {int64_t{1}, layout.groups()}) {
      LinearTile tile = operands.Tile(expected.data());
      tile.scales_per_row = scales_per_row;
      tile.bias = tile.residual = operands.x.data();
      if (layout.padded_k() < layout.n) tile.residual = nullptr;
      kScalarKernels.linear_int8(tile);
      tile.y = actual.data();
      const PanelKernels& panels = *kAmxKernels.panels;
      MultiplyPanels(panels, tile, PackPanels(panels, tile));
      ++products;
      const size_t bytes = sizeof(float) * expected.size();
      if (std::memcmp(expected.data(), actual.data(), bytes) == 0) continue;
      ++wrong;
      std::printf("      %s\n", Text(layout, rows).c_str());
    }
  });
  Report(std::to_string(products) + " products of int8 activations, bit for bit", wrong == 0);
}

void CheckFloats() {
  // docs/cpu-kernels.md promises 4e-6 to 6e-6 of the largest output.
  constexpr double kTolerance = 1e-5;
  int64_t products = 0, wrong = 0;
  double worst = 0;
  ForEachLayout(false, [&](const PackedLayout& layout, int64_t rows) {
    Operands operands(layout, rows);
    WriteNumbers(&operands);
    std::vector<float> expected(static_cast<size_t>(rows * layout.n)), actual(expected);
    std::vector<float> scratch(static_cast<size_t>(kLinearScratchFloats));
    LinearTile tile = operands.Tile(expected.data());
    tile.scratch = scratch.data();
    kScalarKernels.linear_float(tile);
    tile.y = actual.data();
    const PanelKernels& panels = *kAmxKernels.float_panels;
    MultiplyPanels(panels, tile, PackPanels(panels, tile));
    double largest = 0, error = 0;
    for (size_t i = 0; i < expected.size(); ++i) {
      largest = std::max(largest, std::fabs(double{expected[i]}));
      error = std::max(error, std::fabs(double{actual[i]} - expected[i]));
    }
    ++products;
    worst = std::max(worst, error / largest);
    if (error <= kTolerance * largest) return;  // a NaN is not
    ++wrong;
    std::printf("      %s: %.1e\n", Text(layout, rows).c_str(), error / largest);
  });
  char figure[32];
  std::snprintf(figure, sizeof(figure), "%.1e", worst);
  Report(std::to_string(products) + " products of float activations, to " + figure +
             " of the largest output",
         wrong == 0);
}

// --- Threads ---

// A product in pieces, as operators cut it.
struct Pieces {
  Pieces(const PanelKernels& kernels, bool is_float, const PackedLayout& layout, int64_t rows)
      : kernels(kernels), operands(layout, rows) {
    const auto outputs = static_cast<size_t>(rows * layout.n);
    expected.resize(outputs);
    actual.resize(outputs);
    std::vector<float> scratch(static_cast<size_t>(kernels.scratch_bytes(layout)) / sizeof(float) +
                               size_t{kLinearScratchFloats});
    LinearTile tile = operands.Tile(expected.data());
    packed = PackPanels(kernels, tile);
    tile.scratch = scratch.data();
    // Floats are compared with what one thread gives, as these too must not depend on the cut.
    if (is_float) {
      MultiplyPanels(kernels, tile, packed);
    } else {
      kAvx512Kernels.linear_int8(tile);
    }
  }

  int64_t count() const { return row_pieces() * operands.layout.column_blocks(); }
  int64_t row_pieces() const { return (operands.rows + kernels.rows - 1) / kernels.rows; }
  void Run(int64_t piece) {
    LinearTile tile = operands.Tile(actual.data());
    tile.row_begin = piece % row_pieces() * kernels.rows;
    tile.row_end = std::min(tile.row_begin + kernels.rows, operands.rows);
    tile.block_begin = piece / row_pieces();
    tile.block_end = tile.block_begin + 1;
    MultiplyPanels(kernels, tile, packed);
  }
  bool right() const {
    return std::memcmp(expected.data(), actual.data(), sizeof(float) * expected.size()) == 0;
  }

  const PanelKernels& kernels;
  const Operands operands;
  std::vector<float> packed, expected, actual;
};

int64_t Preemptions() {
  rusage usage = {};
  getrusage(RUSAGE_THREAD, &usage);
  return usage.ru_nivcsw;
}

// Threads that are there before the process asks for tiles, as those of a session are.
class Threads {
 public:
  Threads() {
    const std::shared_future<void> begun = begin_.get_future().share();
    for (int i = 0; i < kThreads; ++i) {
      threads_.emplace_back([this, begun, i] {
        begun.wait();
        Work(i % 2 == 1);
      });
    }
  }

  void Check(std::vector<Pieces>* products) {
    products_ = products;
    begin_.set_value();
    for (std::thread& thread : threads_) thread.join();
    int64_t wrong = 0;
    for (const Pieces& pieces : *products) wrong += pieces.right() ? 0 : 1;
    Report(std::to_string(kThreads) + " threads share " + std::to_string(products->size()) +
               " products",
           wrong == 0);
    Report(std::to_string(preemptions_) + " times a thread had to make way for another",
           preemptions_ > 0);
  }

 private:
  static constexpr int kThreads = 4, kRounds = 40;

  void Work(bool with_others) {
    for (;;) {
      int64_t task = next_++;
      if (task >= kRounds * Count()) break;
      // Another library may use the tiles between two calls, and give them back.
      if (with_others) asm volatile("tilerelease");
      task %= Count();
      auto pieces = products_->begin();
      for (; task >= pieces->count(); ++pieces) task -= pieces->count();
      pieces->Run(task);
    }
    preemptions_ += Preemptions();
  }
  int64_t Count() const {
    int64_t count = 0;
    for (const Pieces& pieces : *products_) count += pieces.count();
    return count;
  }

  std::promise<void> begin_;
  std::vector<Pieces>* products_ = nullptr;
  std::atomic<int64_t> next_{0}, preemptions_{0};
  std::vector<std::thread> threads_;
};

// --- Instructions, of an emulator whose time stamps count them ---

uint64_t TimeStamp() {
  uint32_t low, high;
  asm volatile("lfence\n\trdtsc" : "=a"(low), "=d"(high) : : "memory");
  return static_cast<uint64_t>(high) << 32 | low;
}

int64_t CountCall(const PanelKernels& kernels, const PackedLayout& layout, int64_t rows) {
  const Operands operands(layout, rows);
  std::vector<float> y(static_cast<size_t>(rows * layout.n));
  std::vector<float> scratch(static_cast<size_t>(kernels.scratch_bytes(layout)) / sizeof(float));
  LinearTile tile = operands.Tile(y.data());
  const std::vector<float> packed = PackPanels(kernels, tile);
  tile.panels = reinterpret_cast<const uint8_t*>(packed.data());
  tile.scratch = scratch.data();
  uint64_t least = UINT64_MAX;
  for (int i = 0; i < 5; ++i) {  // some with an interrupt
    const uint64_t begin = TimeStamp();
    kernels.multiply(tile);
    least = std::min(least, TimeStamp() - begin);
  }
  return static_cast<int64_t>(least);
}

void CountInstructions(const char* name, const PanelKernels& kernels, int64_t group) {
  constexpr int64_t kDepth = 2048, kFew = 96, kMany = 192;
  const PackedLayout layout = {32, kDepth, group, 4, true, ScaleType::kFloat16, Coding::kInteger};
  const int64_t few = CountCall(kernels, layout, kFew), many = CountCall(kernels, layout, kMany);
  const double products = 32.0 * kDepth * (kMany - kFew);
  std::printf("count %s, groups of %d: %d rows %d, %d rows %d; %.4f a product, unpacking %d\n",
              name, static_cast<int>(group), static_cast<int>(kFew), static_cast<int>(few),
              static_cast<int>(kMany), static_cast<int>(many),
              static_cast<double>(many - few) / products, static_cast<int>(2 * few - many));
}

void CountAll() {
  for (const int64_t group : {32, 64, 128, 2048}) {
    CountInstructions("avx512 int8", *kAvx512Kernels.panels, group);
    CountInstructions("amx int8", *kAmxKernels.panels, group);
  }
  CountInstructions("amx float", *kAmxKernels.float_panels, 128);
}

int CheckAll(bool count) {
  CheckPermission();
  Threads threads;
  CheckChoice();
  if (!passed) std::exit(1);  // whatever the threads wait for
  CheckInt8();
  CheckFloats();
  std::vector<Pieces> products;
  for (const int64_t group : {32, 64, 1056}) {
    const PackedLayout layout = {72, 1056, group, 4, true, ScaleType::kFloat16, Coding::kInteger};
    products.emplace_back(*kAmxKernels.panels, false, layout, 70);
    products.emplace_back(*kAmxKernels.float_panels, true, layout, 70);
  }
  threads.Check(&products);
  if (count) CountAll();
  std::printf("%s\n", passed ? "PASSED" : "FAILED");
  return passed ? 0 : 1;
}

}  // namespace
}  // namespace qcompile::cpu

int main(int count, char**) { return qcompile::cpu::CheckAll(count > 1); }
