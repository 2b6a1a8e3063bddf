// The layers that take a network's time, for CPUs, in float32: custom calls of XLA.
//
// Compiled on the machine that runs it, for its own processor, by kernels.py, which says what each
// function takes. Before editing: every sum is formed in an order that depends on shapes alone, not
// on how many threads there are, so that a run can be repeated to the bit. Maps are b h w c,
// kernels k k i d, all of them dense. A NaN that comes in has to come out.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <mutex>
#include <optional>
#include <thread>
#include <utility>
#include <vector>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#if defined(__linux__)
#include <sched.h>
#endif

#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;
using Floats = ffi::Buffer<ffi::F32>;
using Result = ffi::ResultBuffer<ffi::F32>;

// --- vectors -------------------------------------------------------------------------------------

#if defined(__AVX512F__)
constexpr int LANES = 16, ROWS = 12;  // 24 of 32 registers hold a tile of a product
#elif defined(__AVX__)
constexpr int LANES = 8, ROWS = 6;
#else
constexpr int LANES = 4, ROWS = 6;
#endif
constexpr int COLUMNS = 2 * LANES;

// What has to be a part of its caller, where vectors stay in registers.
#define INLINE inline __attribute__((always_inline))

typedef float Vector __attribute__((vector_size(LANES * 4)));
typedef int32_t Integers __attribute__((vector_size(LANES * 4)));
typedef float Unaligned __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

INLINE Vector load(const float* from) { return *reinterpret_cast<const Unaligned*>(from); }
INLINE void store(float* to, Vector value) { *reinterpret_cast<Unaligned*>(to) = value; }
INLINE Vector all(float value) { return value - Vector{}; }

// Of `count` floats, LANES at most; the rest is zero.
INLINE Vector load(const float* from, int64_t count) {
  if (count >= LANES) return load(from);
  Vector value{};
  std::memcpy(&value, from, count * sizeof(float));
  return value;
}

INLINE void store(float* to, Vector value, int64_t count) {
  if (count >= LANES) return store(to, value);
  std::memcpy(to, &value, count * sizeof(float));
}

// Where a vector of channels begins: the last one of a row overlaps the one before it, so that all
// are whole unless there are fewer channels than lanes.
inline int64_t begin_of(int64_t block, int64_t channels) {
  return std::min(block * LANES, std::max<int64_t>(channels - LANES, 0));
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

INLINE Vector at_least(Vector x, float limit) {  // lets a NaN pass, as at_most does
#if defined(__AVX512F__)
  return _mm512_max_ps(all(limit), x);  // which of a NaN and a number give the second
#else
  return x < all(limit) ? all(limit) : x;
#endif
}

INLINE Vector at_most(Vector x, float limit) {
#if defined(__AVX512F__)
  return _mm512_min_ps(all(limit), x);
#else
  return x > all(limit) ? all(limit) : x;
#endif
}

INLINE Vector reciprocal(Vector x) {
#if defined(__AVX512F__)
  const Vector y = _mm512_rcp14_ps(x);  // a division takes as long as ten products
  return y * (2.0f - x * y);
#else
  return 1.0f / x;
#endif
}

// exp, to 2 units in the last place near 0 and 1e-6 of itself where it is smallest or largest; held
// between the smallest and largest normal numbers.
INLINE Vector exponential(Vector x) {
  x = at_least(at_most(x, 88.0f), -87.0f);
  constexpr float LOG2_E = 1.44269504088896341f;
  const Vector rounder = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vector shifted = x * LOG2_E + rounder;
  const Vector power = shifted - rounder;
  const Vector r = x * LOG2_E - power;
  Vector y = all(1.326472703e-3f);  // 2^r from -1/2 to 1/2, to 9e-8 of itself and exact at 0
  y = y * r + 9.671512692e-3f;
  y = y * r + 5.550733744e-2f;
  y = y * r + 2.402224208e-1f;
  y = y * r + 6.931469776e-1f;
  y = y * r + 1.0f;
  // The low bits of `shifted` hold the power. A product, since adding it to the exponent of y could
  // make a number of a NaN, whose bits may be any.
  const Integers scale = (reinterpret_cast<Integers>(shifted) << 23) + (127 << 23);
  return y * reinterpret_cast<Vector>(scale);
}

INLINE float total(Vector x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(x);
#else
  float sum = 0;
  for (int i = 0; i < LANES; ++i) sum += x[i];
  return sum;
#endif
}

// Numbers of ACTIVATIONS in kernels.py.
enum Activation : int64_t { NONE, SILU, RELU, RELU6, HARD_SWISH };

template <Activation kind>
INLINE Vector activate(Vector x) {
  if constexpr (kind == SILU) return x * reciprocal(1.0f + exponential(-x));
  if constexpr (kind == RELU) return at_least(x, 0);
  if constexpr (kind == RELU6) return at_most(at_least(x, 0), 6);
  if constexpr (kind == HARD_SWISH) return x * at_most(at_least(x + 3.0f, 0), 6) * (1 / 6.0f);
  return x;
}

// The derivative at x; at a kink, what JAX gives.
template <Activation kind>
INLINE Vector slope(Vector x) {
  const Vector one = all(1), zero = all(0), nan_or_0 = x - x;
  if constexpr (kind == SILU) {
    const Vector gate = reciprocal(1.0f + exponential(-x));
    return gate * (1.0f + x * (1.0f - gate));
  }
  if constexpr (kind == RELU) return (x > zero ? one : zero) + nan_or_0;
  if constexpr (kind == RELU6)
    return (x > zero ? (x < all(6) ? one : zero) : zero) + nan_or_0;
  if constexpr (kind == HARD_SWISH)
    return (x > all(-3) ? (x < all(3) ? (2.0f * x + 3.0f) / 6.0f : one) : zero) + nan_or_0;
  return one;
}

// Calls `body` with the activation as a constant.
template <typename Body>
void with(int64_t activation, Body body) {
  switch (activation) {
    case SILU: return body(std::integral_constant<Activation, SILU>());
    case RELU: return body(std::integral_constant<Activation, RELU>());
    case RELU6: return body(std::integral_constant<Activation, RELU6>());
    case HARD_SWISH: return body(std::integral_constant<Activation, HARD_SWISH>());
    default: return body(std::integral_constant<Activation, NONE>());
  }
}

// --- threads -------------------------------------------------------------------------------------

// Programs, and other work that keeps a core busy, now, as far as who has it says so
// (`begin_program`, `begin_work`).
std::atomic<int64_t> programs{0};

struct alignas(64) Core {
  std::atomic<int> threads{0};
};

// A core for a thread that computes, for as long as the seat lives. Where several programs run, Linux
// leaves two such threads on one core for up to 20 ms, in turns, while another core has nothing to
// do. So each says where it is, and who finds another one there goes to a core that nobody has.
class Seat {
#if defined(__linux__)
 public:
  Seat() {
    const int here = sched_getcpu();
    if (here < 0 || here >= CORES) return;
    core_ = here;
    cpu_set_t allowed, one;
    if (taken_[here].threads++ == 0 || sched_getaffinity(0, sizeof allowed, &allowed)) return;
    for (int core = (here + 1) % CORES; core != here; core = (core + 1) % CORES) {
      int nobody = 0;
      if (!CPU_ISSET(core, &allowed)) continue;
      if (!taken_[core].threads.compare_exchange_strong(nobody, 1)) continue;
      CPU_ZERO(&one);
      CPU_SET(core, &one);
      sched_setaffinity(0, sizeof one, &one);
      sched_setaffinity(0, sizeof allowed, &allowed);
      --taken_[std::exchange(core_, core)].threads;
      return;
    }
  }

  ~Seat() {
    if (core_ >= 0) --taken_[core_].threads;
  }

  Seat(const Seat&) = delete;

 private:
  static constexpr int CORES = CPU_SETSIZE;
  static inline Core taken_[CORES];
  int core_ = -1;
#else
 public:
  Seat() {}
#endif
};

// Threads that help with one job at a time. A network is a chain of short jobs, and to wake a
// thread of XLA's takes as long as many of them: these look out for the next job a while before
// they sleep, and give way meanwhile to whoever wants the core.
class Helpers {
 public:
  explicit Helpers(int64_t count) : count_(count), shares_(count + 1) {
    for (int64_t i = 1; i <= count; ++i) std::thread([this, i] { live(i); }).detach();
  }

  // body(0), body(1), … up to units, each once. A thread begins with its own share of them, an
  // equal one in their order, and then takes what is left of others': what a layer wrote is so read
  // by the same core, mostly, in the next one.
  template <typename Body>
  void run(int64_t units, const Body& body) {
    const Seat seat;
    std::unique_lock<std::mutex> mine(one_job_, std::defer_lock);
    // With a program for every core, helpers would take its core from another one. And another job
    // may have them.
    if (units == 1 || count_ == 0 || programs > count_ || !mine.try_lock()) {
      for (int64_t unit = 0; unit < units; ++unit) body(unit);
      return;
    }
    body_ = &body;
    call_ = [](const void* body, int64_t unit) { (*static_cast<const Body*>(body))(unit); };
    const int64_t threads = count_ + 1;
    for (int64_t i = 0; i < threads; ++i) {
      shares_[i].next = i * units / threads;
      shares_[i].end = (i + 1) * units / threads;
    }
    open_ = true;
    ++jobs_;
    if (sleeping_ > 0) {
      std::lock_guard<std::mutex> lock(sleep_);
      wake_.notify_all();
    }
    work(0);
    open_ = false;  // who comes now does nothing
    // Whose core was taken away, by a thread that decodes images, say, needs one to finish.
    for (int64_t i = 0; inside_ > 0; ++i) i < SPINS ? pause() : std::this_thread::yield();
  }

 private:
  struct alignas(64) Share {
    std::atomic<int64_t> next{0};
    int64_t end = 0;
  };

  static constexpr int64_t SPINS = 1000;  // some tens of microseconds

  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }

  void work(int64_t me) {
    for (int64_t i = 0; i <= count_; ++i) {
      Share& share = shares_[(me + i) % (count_ + 1)];
      for (int64_t unit; (unit = share.next.fetch_add(1)) < share.end;) call_(body_, unit);
    }
  }

  void live(int64_t me) {
    for (uint64_t seen = 0;;) {
      const auto until = std::chrono::steady_clock::now() + std::chrono::microseconds(200);
      while (jobs_ == seen && std::chrono::steady_clock::now() < until) {
        for (int i = 0; i < 32 && jobs_ == seen; ++i) pause();
        std::this_thread::yield();
      }
      if (jobs_ == seen) {
        std::unique_lock<std::mutex> lock(sleep_);
        ++sleeping_;
        wake_.wait(lock, [&] { return jobs_ != seen; });
        --sleeping_;
      }
      seen = jobs_;
      ++inside_;
      if (open_) {
        const Seat seat;
        work(me);
      }
      --inside_;
    }
  }

  const int64_t count_;
  std::mutex one_job_, sleep_;
  std::condition_variable wake_;
  const void* body_ = nullptr;
  void (*call_)(const void*, int64_t) = nullptr;
  std::vector<Share> shares_;
  std::atomic<int64_t> inside_{0}, sleeping_{0};
  std::atomic<uint64_t> jobs_{0};
  std::atomic<bool> open_{false};
};

// As many threads as XLA has, with the one that asks.
int64_t threads_of(ffi::ThreadPool& pool) { return std::max<int64_t>(pool.num_threads(), 1); }

Helpers& helpers(int64_t count) {
  static Helpers* shared = new Helpers(count);  // as long as the process: they never return
  return *shared;
}

template <typename Body>
void parallel(ffi::ThreadPool& pool, int64_t units, const Body& body) {
  helpers(threads_of(pool) - 1).run(units, body);
}

// Memory of this thread's own, of at least so many floats, in whole cache lines.
float* scratch(int which, int64_t floats) {
  thread_local std::vector<float> held[3];
  if (held[which].size() < static_cast<size_t>(floats) + 16) held[which].resize(floats + 16);
  const auto address = reinterpret_cast<uintptr_t>(held[which].data());
  return reinterpret_cast<float*>((address + 63) / 64 * 64);
}

// --- matrix products and convolutions ------------------------------------------------------------

// Rows of one operand, which lie at equal distances within a line and anywhere between lines: the
// rows of a matrix, or the pixels under one tap of a kernel in each row of a map.
struct Lines {
  const float* data;
  int64_t count, length;         // lines, and rows in each
  int64_t rows;                  // of all lines together; the last one may be shorter
  int64_t step;                  // floats from row to row
  int64_t line_step, per_image;  // floats from line to line, and lines in an image
  int64_t image_step;            // floats from image to image

  const float* line(int64_t i) const {
    return data + i / per_image * image_step + i % per_image * line_step;
  }
  int64_t rows_of(int64_t i) const { return std::min(length, rows - i * length); }
};

constexpr int64_t BLOCK = 128;     // rows, about, that are multiplied by a packed panel
constexpr int64_t UNITS_EACH = 8;  // units of work for a thread, where there is as much

Lines lines_of(const float* matrix, int64_t rows, int64_t columns) {
  const int64_t count = std::max<int64_t>(ceil_div(rows, ROWS), 1);
  return {matrix, count, ROWS, rows, columns, ROWS * columns, count, 0};
}

// The pixels of a padded map that one tap meets, for all pixels of an output of height x width.
Lines lines_of(const Floats& padded, int64_t height, int64_t width, int64_t stride) {
  const auto shape = padded.dimensions();
  const int64_t row = shape[2] * shape[3], count = shape[0] * height;
  return {padded.typed_data(), count,        width,  count * width,
          stride * shape[3],   stride * row, height, shape[1] * row};
}

// to (R, COLUMNS) = sum over taps and k of a[r * row + tap + k * step] times row k of the panel, of
// V vectors, whose rows are `next` floats apart. A function of its own, lest the compiler keep the
// sums in memory.
template <int R, int V>
__attribute__((noinline)) void multiply(const float* a, int64_t row, int64_t step,
                                        const int64_t* taps, int64_t count, int64_t depth,
                                        const float* panel, int64_t next, float* to,
                                        int64_t to_step) {
  Vector sums[R][V] = {};
  for (int64_t t = 0; t < count; ++t) {
    const float* from = a + taps[t];
    for (int64_t k = 0; k < depth; ++k, panel += next) {
      Vector values[V];
      for (int j = 0; j < V; ++j) values[j] = load(panel + j * LANES);
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) {
        const Vector value = all(from[r * row + k * step]);
        for (int j = 0; j < V; ++j) sums[r][j] += value * values[j];
      }
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < V; ++j) store(to + r * to_step + j * LANES, sums[r][j]);
}

// The same for 1 to ROWS rows and 1 to COLUMNS columns; of the others `to` keeps what it had.
void multiply(int64_t rows, int64_t columns, const float* a, int64_t row, int64_t step,
              const std::vector<int64_t>& taps, int64_t depth, const float* panel, int64_t next,
              float* to, int64_t to_step = COLUMNS) {
  [&]<int... index>(std::integer_sequence<int, index...>) {
    const auto with = [&](auto multiply) {
      multiply(a, row, step, taps.data(), taps.size(), depth, panel, next, to, to_step);
    };
    ((rows != index + 1 ? void()
      : columns <= LANES ? with(multiply<index + 1, 1>)
                         : with(multiply<index + 1, 2>)),
     ...);
  }(std::make_integer_sequence<int, ROWS>());
}

constexpr int64_t PATCH = 2;  // pixels along a side of a patch
constexpr int64_t PLACES = PATCH * PATCH;

// What becomes of a product before it is stored: times a scale, plus a shift, activated, plus
// another map, times a vector for each image and place in a patch. Each may be absent.
struct Finish {
  const float *scale = nullptr, *shift = nullptr;
  int64_t activation = NONE;
  const float *added = nullptr, *times = nullptr;
  int64_t height = 0, width = 0;  // of the map, for `times`

  // The vectors of so many pixels from `at` on.
  void times_of(int64_t at, int64_t count, int64_t features, const float** to) const {
    for (int64_t i = 0, y = at / width, x = at % width; i < count; ++i) {
      const int64_t place = y % PATCH * PATCH + x % PATCH;
      to[i] = times + (y / height * PLACES + place) * features;
      if (++x == width) x = 0, ++y;
    }
  }
};

const float* optional(const Floats& buffer) {
  return buffer.element_count() ? buffer.typed_data() : nullptr;
}

// Finishes a tile of a product and stores it from row `at` of `to` on, in columns from `begin` on.
void finish_tile(const float* tile, int64_t rows, const Finish& finish, int64_t features,
                 int64_t at, int64_t begin, float* to) {
  const float* times[ROWS];
  if (finish.times) finish.times_of(at, rows, features, times);
  with(finish.activation, [&](auto kind) {
    for (int j = 0; j < 2; ++j) {
      const int64_t first = begin + j * LANES, count = features - first;
      if (count <= 0) break;
      const Vector scale = finish.scale ? load(finish.scale + first, count) : all(1);
      const Vector shift = finish.shift ? load(finish.shift + first, count) : all(0);
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t place = (at + r) * features + first;
        const Vector value = load(tile + r * COLUMNS + j * LANES) * scale + shift;
        Vector y = activate<decltype(kind)::value>(value);
        if (finish.added) y += load(finish.added + place, count);
        if (finish.times) y *= load(times[r] + first, count);
        store(to + place, y, count);
      }
    }
  });
}

// A matrix, or some columns of one: rows are `step` floats apart.
struct Matrix {
  const float* data;
  int64_t rows, columns, step;

  Matrix(const float* data, int64_t rows, int64_t columns)
      : data(data), rows(rows), columns(columns), step(columns) {}
  explicit Matrix(const Floats& kernel)  // of one of 1 x 1 or more taps, one below the other
      : Matrix(kernel.typed_data(), kernel.element_count() / kernel.dimensions().back(),
               kernel.dimensions().back()) {}
  Matrix part(int64_t first, int64_t count) const {
    Matrix some = *this;
    some.data += first;
    some.columns = count;
    return some;
  }
  int64_t panels() const { return ceil_div(columns, COLUMNS); }
  int64_t packed_size() const { return panels() * rows * COLUMNS; }
};

// A panel: COLUMNS columns of a matrix from `begin` on, row after row, with zeros beyond its end.
void pack(const Matrix& matrix, int64_t begin, float* panel) {
  constexpr int64_t AHEAD = 16;  // rows, which lie too far apart for the processor to foresee them
  const int64_t left = matrix.columns - begin;
  const float* from = matrix.data + begin;
  for (int64_t k = 0; k < matrix.rows; ++k, panel += COLUMNS, from += matrix.step) {
    for (int j = 0; j < 2; ++j) __builtin_prefetch(from + AHEAD * matrix.step + j * LANES);
    store(panel, load(from, left));
    store(panel + LANES, left > LANES ? load(from + LANES, left - LANES) : Vector{});
  }
}

void pack_all(const Matrix& matrix, float* panels) {
  for (int64_t p = 0; p < matrix.panels(); ++p)
    pack(matrix, p * COLUMNS, panels + p * matrix.rows * COLUMNS);
}

// The part of a product that is in these lines and panels of columns, on this thread. `packed` has
// all panels of the kernel, or is null: each is then packed here.
void product_of(const Lines& a, int64_t first, int64_t last, const std::vector<int64_t>& taps,
                const Matrix& kernel, const float* packed, const Finish& finish, float* to,
                int64_t first_panel, int64_t last_panel) {
  alignas(64) float tile[ROWS * COLUMNS];
  const int64_t depth = kernel.rows / taps.size(), features = kernel.columns;
  for (int64_t p = first_panel; p < last_panel; ++p) {
    const int64_t begin = p * COLUMNS, columns = features - begin;
    const float* panel;
    int64_t next = COLUMNS;
    if (packed) {
      panel = packed + p * kernel.rows * COLUMNS;
    } else if (a.rows <= ROWS && columns >= COLUMNS) {  // used once: as it is
      panel = kernel.data + begin;
      next = kernel.step;
      for (int64_t k = 0; k < kernel.rows; ++k)
        for (int j = 0; j < 2; ++j) __builtin_prefetch(panel + k * next + j * LANES);
    } else {
      float* to_pack = scratch(0, kernel.rows * COLUMNS);
      pack(kernel, begin, to_pack);
      panel = to_pack;
    }
    for (int64_t i = first; i < last; ++i) {
      const int64_t rows = a.rows_of(i), tiles = ceil_div(rows, ROWS);
      for (int64_t t = 0; t < tiles; ++t) {  // as equal as can be
        const int64_t row = t * rows / tiles, count = (t + 1) * rows / tiles - row;
        const int64_t at = i * a.length + row;
        for (int64_t r = at; r < at + count; ++r)  // in the cache by the time it is written
          for (int j = 0; j < 2; ++j) __builtin_prefetch(to + r * features + begin + j * LANES, 1);
        multiply(count, columns, a.line(i) + row * a.step, a.step, 1, taps, depth, panel, next,
                 tile);
        finish_tile(tile, count, finish, features, at, begin, to);
      }
    }
  }
}

// to (rows, features) = finish(sum over taps of a's rows (depth) times kernel (taps depth,
// features)).
void product(ffi::ThreadPool& pool, const Lines& a, const std::vector<int64_t>& taps,
             const Matrix& kernel, const Finish& finish, float* to) {
  const int64_t panels = kernel.panels();
  const int64_t blocks = std::clamp<int64_t>(a.rows / BLOCK, 1, a.count);
  const int64_t groups = std::min(panels, ceil_div(UNITS_EACH * threads_of(pool), blocks));
  parallel(pool, blocks * groups, [&](int64_t unit) {
    const int64_t group = unit % groups, block = unit / groups;
    product_of(a, block * a.count / blocks, (block + 1) * a.count / blocks, taps, kernel, nullptr,
               finish, to, group * panels / groups, (group + 1) * panels / groups);
  });
}

// to (taps, depth, features) = for each tap, the sum over rows of a (depth) times b (features).
//
// Rows are divided into parts by shape alone, each with sums of its own, which are added in order;
// where there are more threads than that, they share the columns of a.
void transposed_product(ffi::ThreadPool& pool, const Lines& a, const std::vector<int64_t>& taps,
                        int64_t depth, const Lines& b, int64_t features, float* to) {
  constexpr int64_t CHUNK = 128;  // rows that are packed, and summed in registers, at a time
  constexpr int64_t ROWS_OF_PART = 512, PARTS = 16;
  const int64_t tiles = ceil_div(depth, ROWS), panels = ceil_div(features, COLUMNS);
  const int64_t tap_count = taps.size(), size = tap_count * depth * features;
  const int64_t parts = std::clamp<int64_t>(a.rows / ROWS_OF_PART, 1, std::min(PARTS, a.count));
  const int64_t shares =
      std::min(tiles, ceil_div(2 * threads_of(pool), tap_count * parts));
  const int64_t most = CHUNK + a.length;
  const std::vector<int64_t> one_tap = {0};
  float* partial = parts == 1 ? to : scratch(2, parts * size);
  parallel(pool, parts * tap_count * shares, [&](int64_t unit) {
    const int64_t share = unit % shares, tap = unit / shares % tap_count;
    const int64_t part = unit / shares / tap_count;
    const int64_t first = share * tiles / shares, last = (share + 1) * tiles / shares;
    const int64_t begin = first * ROWS, end = std::min(last * ROWS, depth);
    const int64_t sums_size = (last - first) * panels * ROWS * COLUMNS;
    float* sums = scratch(1, sums_size);
    std::fill_n(sums, sums_size, 0.0f);
    float* packed_b = scratch(0, most * (panels * COLUMNS + (last - first) * ROWS));
    float* packed_a = packed_b + most * panels * COLUMNS;
    const int64_t last_line = (part + 1) * a.count / parts;
    for (int64_t i = part * a.count / parts; i < last_line;) {
      int64_t rows = 0;
      for (; i < last_line && rows < CHUNK; ++i) {
        const int64_t count = a.rows_of(i);
        const float *from = a.line(i) + taps[tap], *other = b.line(i);
        for (int64_t p = 0; p < panels; ++p)
          pack(Matrix(other, count, features), p * COLUMNS, packed_b + (p * most + rows) * COLUMNS);
        for (int64_t r = 0; r < count; ++r, from += a.step) {
          int64_t k = begin;
          float* place = packed_a + (rows + r) * ROWS;
          for (; k + ROWS <= end; k += ROWS, place += most * ROWS)
            std::memcpy(place, from + k, ROWS * sizeof(float));
          for (int j = 0; k < end && j < ROWS; ++j) place[j] = k + j < end ? from[k + j] : 0.0f;
        }
        rows += count;
      }
      for (int64_t t = 0; t < last - first; ++t)
        for (int64_t p = 0; p < panels; ++p) {
          alignas(64) float tile[ROWS * COLUMNS];
          multiply(ROWS, COLUMNS, packed_a + t * most * ROWS, 1, ROWS, one_tap, rows,
                   packed_b + p * most * COLUMNS, COLUMNS, tile);
          float* sum = sums + (t * panels + p) * ROWS * COLUMNS;
          for (int64_t j = 0; j < ROWS * COLUMNS; j += LANES)
            store(sum + j, load(sum + j) + load(tile + j));
        }
    }
    for (int64_t k = begin; k < end; ++k)
      for (int64_t p = 0; p < panels; ++p) {
        const int64_t tile = (k - begin) / ROWS, row = (k - begin) % ROWS;
        std::memcpy(partial + part * size + (tap * depth + k) * features + p * COLUMNS,
                    sums + ((tile * panels + p) * ROWS + row) * COLUMNS,
                    std::min<int64_t>(COLUMNS, features - p * COLUMNS) * sizeof(float));
      }
  });
  if (parts == 1) return;
  constexpr int64_t PIECE = 4096;
  parallel(pool, ceil_div(size, PIECE), [&](int64_t unit) {
    for (int64_t i = unit * PIECE; i < std::min((unit + 1) * PIECE, size); i += LANES) {
      const int64_t count = size - i;
      Vector sum = load(partial + i, count);
      for (int64_t part = 1; part < parts; ++part) sum += load(partial + part * size + i, count);
      store(to + i, sum, count);
    }
  });
}

// Where the pixels under each tap of a kernel are from the first one of them. Without dilation
// those of a row lie together, and are one tap with all their channels.
std::vector<int64_t> taps_of(const Floats& padded, int64_t size, int64_t dilation, bool together) {
  const auto shape = padded.dimensions();
  std::vector<int64_t> taps;
  for (int64_t i = 0; i < size; ++i)
    for (int64_t j = 0; j < (together && dilation == 1 ? 1 : size); ++j)
      taps.push_back((i * shape[2] + j) * dilation * shape[3]);
  return taps;
}

ffi::Error matmul(ffi::ThreadPool pool, Floats x, Floats kernel, Floats scale, Floats shift,
                  Floats added, int64_t activation, Result y) {
  const Lines rows = lines_of(x.typed_data(), x.dimensions()[0], x.dimensions()[1]);
  const Finish finish{optional(scale), optional(shift), activation, optional(added)};
  product(pool, rows, {0}, Matrix(kernel), finish, y->typed_data());
  return ffi::Error::Success();
}

ffi::Error matmul_kernel_gradient(ffi::ThreadPool pool, Floats x, Floats cotangent, Result to) {
  const int64_t rows = x.dimensions()[0], depth = x.dimensions()[1];
  const int64_t features = cotangent.dimensions()[1];
  transposed_product(pool, lines_of(x.typed_data(), rows, depth), {0}, depth,
                     lines_of(cotangent.typed_data(), rows, features), features, to->typed_data());
  return ffi::Error::Success();
}

ffi::Error convolution(ffi::ThreadPool pool, Floats padded, Floats kernel, Floats scale,
                       Floats shift, Floats added, int64_t stride, int64_t dilation,
                       int64_t activation, Result y) {
  const auto shape = y->dimensions();
  const Finish finish{optional(scale), optional(shift), activation, optional(added)};
  product(pool, lines_of(padded, shape[1], shape[2], stride),
          taps_of(padded, kernel.dimensions()[0], dilation, true), Matrix(kernel), finish,
          y->typed_data());
  return ffi::Error::Success();
}

ffi::Error convolution_kernel_gradient(ffi::ThreadPool pool, Floats padded, Floats cotangent,
                                       int64_t stride, int64_t dilation, Result to) {
  const auto shape = cotangent.dimensions(), kernel_shape = to->dimensions();
  transposed_product(pool, lines_of(padded, shape[1], shape[2], stride),
                     taps_of(padded, kernel_shape[0], dilation, false), kernel_shape[2],
                     lines_of(cotangent, shape[1], shape[2], 1), shape[3], to->typed_data());
  return ffi::Error::Success();
}

// --- attention -----------------------------------------------------------------------------------

// Makes a row of scores, of whole vectors, its exponentials, and returns their sum.
float exponentials(float* row, int64_t count) {
  Vector most = load(row), sum{};
  for (int64_t i = LANES; i < count; i += LANES) {
    const Vector value = load(row + i);
    most = most > value ? most : value;
  }
  float largest = most[0];
  for (int i = 1; i < LANES; ++i) largest = std::max(largest, most[i]);
  for (int64_t i = 0; i < count; i += LANES) {
    const Vector value = exponential(load(row + i) - largest);
    store(row + i, value);
    sum += value;
  }
  return total(sum);
}

// Dot-product attention of every head among the tokens of every pixel position, in a map split into
// patches of 2x2: a pixel's token meets those of the same place in all other patches. `qkv` has
// queries, keys and values one after another, each of all heads.
ffi::Error attention(ffi::ThreadPool pool, Floats qkv, int64_t heads, Result y) {
  const auto shape = qkv.dimensions();
  const int64_t height = shape[1], width = shape[2], channels = shape[3] / 3;
  const int64_t depth = channels / heads, columns = width / PATCH;
  const int64_t tokens = height / PATCH * columns;
  const int64_t key_panels = ceil_div(tokens, COLUMNS), panels = ceil_div(depth, COLUMNS);
  const int64_t padded = key_panels * COLUMNS;
  const float factor = 1.0f / std::sqrt(static_cast<float>(depth));
  const std::vector<int64_t> one_tap = {0};
  parallel(pool, shape[0] * PLACES * heads, [&](int64_t unit) {
    const int64_t head = unit % heads, place = unit / heads % PLACES;
    const int64_t image = unit / heads / PLACES;
    const auto pixel = [&](int64_t token) {
      const int64_t row = token / columns * PATCH + place / PATCH;
      return (image * height + row) * width + token % columns * PATCH + place % PATCH;
    };
    float* queries = scratch(0, (tokens + padded) * depth + panels * COLUMNS * tokens);
    float* keys = queries + tokens * depth;   // key_panels depth COLUMNS
    float* values = keys + padded * depth;    // panels tokens COLUMNS
    float* scores = scratch(1, ROWS * padded);  // of some queries
    for (int64_t n = 0; n < tokens; ++n) {
      const float* from = qkv.typed_data() + pixel(n) * 3 * channels + head * depth;
      float* key = keys + n / COLUMNS * depth * COLUMNS + n % COLUMNS;
      for (int64_t c = 0; c < depth; ++c) {
        queries[n * depth + c] = from[c] * factor;
        key[c * COLUMNS] = from[channels + c];
      }
      for (int64_t p = 0; p < panels; ++p)
        pack(Matrix(from + 2 * channels, 1, depth), p * COLUMNS,
             values + (p * tokens + n) * COLUMNS);
    }
    const int64_t tiles = ceil_div(tokens, ROWS);
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t first = t * tokens / tiles, rows = (t + 1) * tokens / tiles - first;
      alignas(64) float tile[ROWS * COLUMNS];
      for (int64_t p = 0; p < key_panels; ++p)
        multiply(rows, COLUMNS, queries + first * depth, depth, 1, one_tap, depth,
                 keys + p * depth * COLUMNS, COLUMNS, scores + p * COLUMNS, padded);
      float inverse[ROWS];
      for (int64_t r = 0; r < rows; ++r) {
        float* row = scores + r * padded;
        std::fill(row + tokens, row + padded, -std::numeric_limits<float>::infinity());
        inverse[r] = 1 / exponentials(row, padded);
      }
      for (int64_t p = 0; p < panels; ++p) {
        multiply(rows, depth - p * COLUMNS, scores, padded, 1, one_tap, tokens,
                 values + p * tokens * COLUMNS, COLUMNS, tile);
        for (int64_t r = 0; r < rows; ++r) {
          float* to = y->typed_data() + pixel(first + r) * channels + head * depth;
          for (int64_t j = 0; j < COLUMNS && p * COLUMNS + j < depth; j += LANES)
            store(to + p * COLUMNS + j, load(tile + r * COLUMNS + j) * inverse[r],
                  depth - p * COLUMNS - j);
        }
      }
    }
  });
  return ffi::Error::Success();
}

// The context of separable attention (b, 4, d): for every place in a patch, the key of the average
// token by a softmax over scores. `kernel` (d, 1 + 2d) and `bias` are of the score, the key and the
// value, in this order. Some rows at a time, whose sums are put together as if all had been there
// at once.
ffi::Error separable_context(ffi::ThreadPool pool, Floats x, Floats kernel, Floats bias,
                             Result to) {
  constexpr int64_t CHUNKS = 16;  // of rows of patches, at most
  constexpr float LEAST = -std::numeric_limits<float>::infinity();
  const auto shape = x.dimensions();
  const int64_t height = shape[1], width = shape[2], channels = shape[3];
  const int64_t padded = ceil_div(channels, LANES) * LANES, rows = height / PATCH;
  const int64_t chunks = std::min(CHUNKS, rows);
  struct Sums {  // of weights, and of tokens times them; a weight is exp(score - most)
    float most = LEAST, weight = 0;
    std::vector<float> tokens;
  };
  std::vector<Sums> partial(shape[0] * chunks * PLACES);
  std::vector<float> query(padded);
  for (int64_t c = 0; c < channels; ++c) query[c] = kernel.typed_data()[c * (1 + 2 * channels)];
  parallel(pool, shape[0] * chunks, [&](int64_t unit) {
    const int64_t image = unit / chunks, chunk = unit % chunks;
    Sums* sums = &partial[unit * PLACES];
    for (int64_t place = 0; place < PLACES; ++place) sums[place].tokens.resize(padded);
    const int64_t scores_size = ceil_div(width, LANES) * LANES;
    float* scores = scratch(0, scores_size);
    std::fill_n(scores, scores_size, 0.0f);
    for (int64_t y = chunk * rows / chunks * PATCH; y < (chunk + 1) * rows / chunks * PATCH; ++y) {
      const float* row = x.typed_data() + (image * height + y) * width * channels;
      Sums* places = sums + y % PATCH * PATCH;
      float most[PATCH];
      for (int64_t i = 0; i < PATCH; ++i) most[i] = places[i].most;
      for (int64_t column = 0; column < width; ++column) {
        Vector products{};
        for (int64_t c = 0; c < channels; c += LANES)
          products += load(row + column * channels + c, channels - c) * load(&query[c]);
        scores[column] = bias.typed_data()[0] + total(products);
        if (!(scores[column] <= most[column % PATCH])) most[column % PATCH] = scores[column];
      }
      for (int64_t i = 0; i < PATCH; ++i) {
        if (places[i].most == most[i]) continue;
        const float factor = exponential(all(places[i].most - most[i]))[0];
        for (float& token : places[i].tokens) token *= factor;
        places[i].weight *= factor;
        places[i].most = most[i];
      }
      for (int64_t column = 0; column < width; ++column) scores[column] -= most[column % PATCH];
      for (int64_t i = 0; i < scores_size; i += LANES)
        store(scores + i, exponential(load(scores + i)));
      for (int64_t column = 0; column < width; ++column) {
        float* tokens = places[column % PATCH].tokens.data();
        for (int64_t c = 0; c < channels; c += LANES)
          store(tokens + c, load(tokens + c) + load(row + column * channels + c, channels - c) *
                                                   scores[column]);
        places[column % PATCH].weight += scores[column];
      }
    }
  });
  const int64_t count = shape[0] * PLACES;
  std::vector<float> average(count * padded);
  for (int64_t i = 0; i < count; ++i) {
    const auto part = [&](int64_t chunk) -> const Sums& {
      return partial[(i / PLACES * chunks + chunk) * PLACES + i % PLACES];
    };
    float most = LEAST, weight = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk)
      if (!(part(chunk).most <= most)) most = part(chunk).most;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const float factor = exponential(all(part(chunk).most - most))[0];
      weight += factor * part(chunk).weight;
      for (int64_t c = 0; c < channels; ++c)
        average[i * channels + c] += factor * part(chunk).tokens[c];
    }
    for (int64_t c = 0; c < channels; ++c) average[i * channels + c] /= weight;
  }
  const Finish finish{nullptr, bias.typed_data() + 1};
  product(pool, lines_of(average.data(), count, channels), {0}, Matrix(kernel).part(1, channels),
          finish, to->typed_data());
  return ffi::Error::Success();
}

// relu(x * kernel + bias) times the context, with kernel and bias as above.
ffi::Error separable_values(ffi::ThreadPool pool, Floats x, Floats kernel, Floats bias,
                            Floats context, Result y) {
  const auto shape = x.dimensions();
  const int64_t channels = shape[3];
  const Finish finish{nullptr, bias.typed_data() + 1 + channels, RELU, nullptr,
                      context.typed_data(), shape[1], shape[2]};
  product(pool, lines_of(x.typed_data(), shape[0] * shape[1] * shape[2], channels), {0},
          Matrix(kernel).part(1 + channels, channels), finish, y->typed_data());
  return ffi::Error::Success();
}

// --- depthwise convolutions ----------------------------------------------------------------------

struct Map {
  int64_t images, height, width, channels;

  Map(int64_t images, int64_t height, int64_t width, int64_t channels)
      : images(images), height(height), width(width), channels(channels) {}
  explicit Map(ffi::Span<const int64_t> shape) : Map(shape[0], shape[1], shape[2], shape[3]) {}
  int64_t blocks() const { return ceil_div(channels, LANES); }
};

// A kernel of K x K taps over a map, padded so that the output is as large as the map at stride 1.
template <int K>
struct Window {
  const Map in, out;
  const int64_t stride, dilation, pad = (K - 1) / 2 * dilation;
  // Outputs of a row, from first to last, whose taps all lie inside the map.
  int64_t first = std::min(ceil_div(pad, stride), out.width), last = first;

  Window(const Map& in, const Map& out, int64_t stride, int64_t dilation)
      : in(in), out(out), stride(stride), dilation(dilation) {
    const int64_t room = in.width - 1 + pad - (K - 1) * dilation;
    if (room >= 0) last = std::clamp(room / stride + 1, first, out.width);
  }

  // Calls tap(output column, tap, vector of the map) for all taps inside the map of one row of
  // output, in channels from c on, `count` of them; before and after those of a column, begin and
  // end. Its order is that of columns, then of taps.
  template <typename Begin, typename Tap, typename End>
  void row(const float* map, int64_t image, int64_t y, int64_t c, int64_t count, Begin begin,
           Tap tap, End end) const {
    const float* rows[K];
    for (int i = 0; i < K; ++i) {
      const int64_t from = y * stride - pad + i * dilation;
      const bool inside = from >= 0 && from < in.height;
      rows[i] = inside ? map + (image * in.height + from) * in.width * in.channels + c : nullptr;
    }
    const auto edge = [&](int64_t x) {
      begin(x);
      for (int i = 0; i < K; ++i)
        for (int j = 0; rows[i] && j < K; ++j) {
          const int64_t from = x * stride - pad + j * dilation;
          if (from >= 0 && from < in.width)
            tap(x, i * K + j, load(rows[i] + from * in.channels, count));
        }
      end(x);
    };
    for (int64_t x = 0; x < first; ++x) edge(x);
    if (count == LANES && std::all_of(rows, rows + K, [](const float* row) { return row; })) {
      const int64_t step = dilation * in.channels;
      for (int64_t x = first; x < last; ++x) {
        const int64_t from = (x * stride - pad) * in.channels;
        begin(x);
#pragma GCC unroll 5
        for (int i = 0; i < K; ++i)
#pragma GCC unroll 5
          for (int j = 0; j < K; ++j) tap(x, i * K + j, load(rows[i] + from + j * step));
        end(x);
      }
    } else {
      for (int64_t x = first; x < last; ++x) edge(x);
    }
    for (int64_t x = last; x < out.width; ++x) edge(x);
  }
};

// Calls `body` with the size of a kernel, 3 or 5, as a constant.
template <typename Body>
void with_size(int64_t size, Body body) {
  if (size == 3) body(std::integral_constant<int, 3>());
  if (size == 5) body(std::integral_constant<int, 5>());
}

// A row of the output of a depthwise convolution, finished; `map` is that of all images, and what
// is added lies as `to` does.
template <int K, Activation kind>
void depthwise_row(const Window<K>& window, const float* map, int64_t image, int64_t y,
                   const float* kernel, const Finish& finish, float* to) {
  const int64_t channels = window.in.channels, some = std::min<int64_t>(channels, LANES);
  for (int64_t block = 0; block < window.in.blocks(); ++block) {
    const int64_t c = begin_of(block, channels);
    Vector weights[K * K], sum;
    for (int t = 0; t < K * K; ++t) weights[t] = load(kernel + t * channels + c, some);
    const Vector times = finish.scale ? load(finish.scale + c, some) : all(1);
    const Vector plus = finish.shift ? load(finish.shift + c, some) : all(0);
    window.row(
        map, image, y, c, some, [&](int64_t) { sum = Vector{}; },
        [&](int64_t, int t, Vector value) { sum += value * weights[t]; },
        [&](int64_t column) {
          const int64_t place = column * channels + c;
          Vector value = activate<kind>(sum * times + plus);
          if (finish.added) value += load(finish.added + place, some);
          store(to + place, value, some);
        });
  }
}

ffi::Error depthwise(ffi::ThreadPool pool, Floats x, Floats kernel, Floats scale, Floats shift,
                     Floats added, int64_t stride, int64_t dilation, int64_t activation,
                     Result y) {
  const Map in(x.dimensions()), out(y->dimensions());
  with_size(kernel.dimensions()[0], [&](auto size) {
    constexpr int K = decltype(size)::value;
    const Window<K> window(in, out, stride, dilation);
    with(activation, [&](auto kind) {
      parallel(pool, out.images * out.height, [&](int64_t unit) {
        const int64_t place = unit * out.width * out.channels;
        const Finish finish{optional(scale), optional(shift), activation,
                            optional(added) ? optional(added) + place : nullptr};
        depthwise_row<K, decltype(kind)::value>(window, x.typed_data(), unit / out.height,
                                                unit % out.height, kernel.typed_data(), finish,
                                                y->typed_data() + place);
      });
    });
  });
  return ffi::Error::Success();
}

// Expand, filter by a depthwise kernel of 3x3, project; each with a scale and a shift, the first
// two activated; plus x if `residual`. Some rows at a time, of which the expanded ones stay in the
// cache, those that the next ones need too.
ffi::Error inverted_residual(ffi::ThreadPool pool, Floats x, Floats expand, Floats scale_1,
                             Floats shift_1, Floats filter, Floats scale_2, Floats shift_2,
                             Floats project, Floats scale_3, Floats shift_3, int64_t stride,
                             int64_t activation, int64_t residual, Result y) {
  constexpr int64_t CACHE = 256 * 1024 / sizeof(float);  // floats of expanded rows
  const Map in(x.dimensions()), out(y->dimensions());
  const Matrix expansion(expand), projection(project);
  const int64_t hidden = expansion.columns;
  const auto inside = [&](const Map& map) {
    return Map(map.images, map.height, map.width, hidden);
  };
  const Window<3> window(inside(in), inside(out), stride, 1);
  const int64_t expanded_row = in.width * hidden, filtered_row = out.width * hidden;
  const int64_t packed_size = expansion.packed_size() + projection.packed_size();
  const int64_t fit = (std::max(CACHE, packed_size) / expanded_row - 3) / stride + 1;
  const int64_t at_once = std::clamp<int64_t>(fit, 1, out.height);
  // Where two bands of rows meet, both expand the rows at the edge.
  const int64_t bands = std::min(ceil_div(threads_of(pool), in.images), out.height);  // of an image
  const Finish expanding{scale_1.typed_data(), shift_1.typed_data(), activation};
  const Finish filtering{scale_2.typed_data(), shift_2.typed_data(), activation};
  with(activation, [&](auto kind) {
    parallel(pool, in.images * bands, [&](int64_t unit) {
      const int64_t image = unit / bands, band = unit % bands;
      const int64_t last = (band + 1) * out.height / bands;
      const int64_t most = (at_once - 1) * stride + 3;  // expanded rows that are held
      const float *packed_expansion = nullptr, *packed_projection = nullptr;
      if (out.height > bands * at_once) {  // they are used more than once
        float* packed = scratch(0, packed_size);
        packed_expansion = packed;
        packed_projection = packed + expansion.packed_size();
        pack_all(expansion, packed);
        pack_all(projection, packed + expansion.packed_size());
      }
      float* expanded = scratch(1, most * expanded_row + at_once * filtered_row);
      float* filtered = expanded + most * expanded_row;
      int64_t held = 0, end = 0;  // rows of the map, from and to, whose expansion is there
      for (int64_t row = band * out.height / bands, next; row < last; row = next) {
        next = std::min(row + at_once, last);
        const int64_t from = std::max<int64_t>(row * stride - 1, 0);
        const int64_t to = std::min((next - 1) * stride + 2, in.height);
        const int64_t kept = std::max<int64_t>(end - from, 0);
        std::memmove(expanded, expanded + (from - held) * expanded_row,
                     kept * expanded_row * sizeof(float));
        const float* source =
            x.typed_data() + (image * in.height + from + kept) * in.width * in.channels;
        const Lines pixels = lines_of(source, (to - from - kept) * in.width, in.channels);
        product_of(pixels, 0, pixels.count, {0}, expansion, packed_expansion, expanding,
                   expanded + kept * expanded_row, 0, expansion.panels());
        held = from;
        end = to;
        for (int64_t i = row; i < next; ++i)
          depthwise_row<3, decltype(kind)::value>(window, expanded - from * expanded_row, 0, i,
                                                  filter.typed_data(), filtering,
                                                  filtered + (i - row) * filtered_row);
        const int64_t place = (image * out.height + row) * out.width * out.channels;
        const Finish projecting{scale_3.typed_data(), shift_3.typed_data(), NONE,
                                residual ? x.typed_data() + place : nullptr};
        const Lines results = lines_of(filtered, (next - row) * out.width, hidden);
        product_of(results, 0, results.count, {0}, projection, packed_projection, projecting,
                   y->typed_data() + place, 0, projection.panels());
      }
    });
  });
  return ffi::Error::Success();
}

// Where a row or column of the map took part: taps, and the output's row or column of each.
struct Uses {
  int64_t count = 0, taps[5], places[5];

  Uses(int64_t at, int64_t size, int64_t stride, int64_t dilation, int64_t out) {
    for (int64_t tap = 0; tap < size; ++tap) {
      const int64_t place = at + (size - 1) / 2 * dilation - tap * dilation;
      if (place < 0 || place % stride || place / stride >= out) continue;
      taps[count] = tap;
      places[count++] = place / stride;
    }
  }
};

ffi::Error depthwise_input_gradient(ffi::ThreadPool pool, Floats cotangent, Floats kernel,
                                    int64_t stride, int64_t dilation, Result to) {
  const Map in(to->dimensions()), out(cotangent.dimensions());
  const int64_t channels = in.channels, some = std::min<int64_t>(channels, LANES);
  const int64_t size = kernel.dimensions()[0];
  std::vector<Uses> columns;
  for (int64_t x = 0; x < in.width; ++x) columns.emplace_back(x, size, stride, dilation, out.width);
  parallel(pool, in.images * in.height, [&](int64_t unit) {
    const Uses rows(unit % in.height, size, stride, dilation, out.height);
    const float* image =
        cotangent.typed_data() + unit / in.height * out.height * out.width * channels;
    float* place = to->typed_data() + unit * in.width * channels;
    for (int64_t x = 0; x < in.width; ++x, place += channels) {
      const Uses& column = columns[x];
      const float *values[25], *weights[25];
      int64_t count = 0;
      for (int64_t i = 0; i < rows.count; ++i)
        for (int64_t j = 0; j < column.count; ++j, ++count) {
          values[count] = image + (rows.places[i] * out.width + column.places[j]) * channels;
          weights[count] =
              kernel.typed_data() + (rows.taps[i] * size + column.taps[j]) * channels;
        }
      for (int64_t block = 0; block < in.blocks(); ++block) {
        const int64_t c = begin_of(block, channels);
        Vector sum{};
        for (int64_t t = 0; t < count; ++t)
          sum += load(values[t] + c, some) * load(weights[t] + c, some);
        store(place + c, sum, some);
      }
    }
  });
  return ffi::Error::Success();
}

// Of each of `parts` equal parts of the rows of all images: the kernel's gradient along them.
ffi::Error depthwise_kernel_gradient(ffi::ThreadPool pool, Floats x, Floats cotangent,
                                     int64_t stride, int64_t dilation, Result to) {
  const Map in(x.dimensions()), out(cotangent.dimensions());
  const auto shape = to->dimensions();
  const int64_t channels = in.channels, some = std::min<int64_t>(channels, LANES);
  const int64_t parts = shape[0], rows = out.images * out.height;
  with_size(shape[1], [&](auto size) {
    constexpr int K = decltype(size)::value;
    const Window<K> window(in, out, stride, dilation);
    parallel(pool, parts, [&](int64_t part) {
      float* totals = scratch(1, in.blocks() * K * K * LANES);
      std::fill_n(totals, in.blocks() * K * K * LANES, 0.0f);
      for (int64_t y = part * rows / parts; y < (part + 1) * rows / parts; ++y) {
        const float* other = cotangent.typed_data() + y * out.width * channels;
        for (int64_t block = 0; block < in.blocks(); ++block) {
          const int64_t c = begin_of(block, channels);
          Vector sums[K * K] = {}, factor;
          window.row(
              x.typed_data(), y / out.height, y % out.height, c, some,
              [&](int64_t column) { factor = load(other + column * channels + c, some); },
              [&](int64_t, int t, Vector value) { sums[t] += value * factor; }, [](int64_t) {});
          float* total = totals + block * K * K * LANES;
          for (int t = 0; t < K * K; ++t, total += LANES) store(total, load(total) + sums[t]);
        }
      }
      for (int64_t block = 0; block < in.blocks(); ++block)
        for (int t = 0; t < K * K; ++t)
          store(to->typed_data() + (part * K * K + t) * channels + begin_of(block, channels),
                load(totals + (block * K * K + t) * LANES), some);
    });
  });
  return ffi::Error::Success();
}

// --- norms ---------------------------------------------------------------------------------------

// Maps as g r c: groups of rows, each group and channel with statistics of its own.
struct Groups {
  int64_t groups, rows, channels;
  int64_t chunks;  // of a group, in rows that stay in the cache; a few threads share them equally

  explicit Groups(ffi::Span<const int64_t> shape)
      : groups(shape[0]), rows(shape[1]), channels(shape[2]) {
    chunks = std::min(rows, ceil_div(rows * channels, 32768));
  }
  int64_t units() const { return groups * chunks; }
  int64_t first(int64_t unit) const { return unit % chunks * rows / chunks; }
  int64_t count(int64_t unit) const { return (unit % chunks + 1) * rows / chunks - first(unit); }
  int64_t begin(int64_t unit) const {  // of its first row, in floats
    return (unit / chunks * rows + first(unit)) * channels;
  }
};

// The sum over rows of value(place), a vector or a pair of them, in channels from c on.
template <typename Value>
inline Vector sum_of(const Groups& all_rows, int64_t unit, int64_t c, Value value) {
  const int64_t count = all_rows.count(unit), channels = all_rows.channels;
  int64_t place = all_rows.begin(unit) + c, row = 0;
  Vector sums[4] = {};
  for (; row + 4 <= count; row += 4)
    for (int i = 0; i < 4; ++i, place += channels) sums[i] += value(place);
  for (; row < count; ++row, place += channels) sums[0] += value(place);
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// Calls body(place, c, index of group and channel) for all vectors of a unit.
template <typename Body>
inline void for_all(const Groups& rows, int64_t unit, Body body) {
  const int64_t channels = rows.channels, group = unit / rows.chunks * channels;
  int64_t place = rows.begin(unit);
  for (int64_t row = 0; row < rows.count(unit); ++row, place += channels)
    for (int64_t block = 0; block < ceil_div(channels, LANES); ++block) {
      const int64_t c = begin_of(block, channels);
      body(place + c, group + c);
    }
}

// Mean and biased variance of each group and channel, or of each group's channels together. A
// chunk's are formed in two passes over what is in the cache; the variance is that within chunks
// plus that between them.
void moments(ffi::ThreadPool& pool, const Groups& rows, const float* x, bool together, float* mean,
             float* variance) {
  const int64_t channels = rows.channels, some = std::min<int64_t>(channels, LANES);
  const int64_t size = rows.units() * channels;
  std::vector<float> means(size), offsets(size), squares(size);  // an offset is a mean's rest
  parallel(pool, rows.units(), [&](int64_t unit) {
    for (int64_t block = 0; block < ceil_div(channels, LANES); ++block) {
      const int64_t c = begin_of(block, channels), at = unit * channels + c;
      const Vector sum =
          sum_of(rows, unit, c, [&](int64_t place) { return load(x + place, some); });
      const float count = rows.count(unit);
      const Vector middle = sum / count;
      // What rounding made of the mean shows in the sum of the distances, which would be zero.
      Vector offset{};
      const Vector square = sum_of(rows, unit, c, [&](int64_t place) {
        const Vector distance = load(x + place, some) - middle;
        offset += distance;
        return distance * distance;
      });
      store(&means[at], middle, some);
      store(&offsets[at], offset / count, some);
      store(&squares[at], square - offset * offset / count, some);
    }
  });
  const double whole = static_cast<double>(rows.rows) * (together ? channels : 1);
  const auto over = [&](int64_t group, int64_t c, auto value) {  // the sum over chunks
    double sum = 0;
    for (int64_t unit = group * rows.chunks; unit < (group + 1) * rows.chunks; ++unit)
      sum += value(unit * channels + c, static_cast<double>(rows.count(unit)));
    return sum;
  };
  for (int64_t group = 0; group < rows.groups; ++group)
    for (int64_t c = 0; c < channels; c += together ? channels : 1) {
      const int64_t place = together ? group : group * channels + c;
      const int64_t end = together ? channels : c + 1;
      double middle = 0, square = 0;
      for (int64_t i = c; i < end; ++i)
        middle += over(group, i, [&](int64_t at, double count) {
          return count * (static_cast<double>(means[at]) + offsets[at]);
        });
      middle /= whole;
      for (int64_t i = c; i < end; ++i)
        square += over(group, i, [&](int64_t at, double count) {
          const double distance = means[at] - middle + offsets[at];
          return squares[at] + count * distance * distance;
        });
      mean[place] = static_cast<float>(middle);
      variance[place] = static_cast<float>(square / whole);
    }
}

// y = activation((x - mean) / sqrt(variance + epsilon) * scale + bias), with the mean and variance
// of each group and channel or, if `together`, of each group.
ffi::Error norm(ffi::ThreadPool pool, Floats x, Floats scale, Floats bias, float epsilon,
                int64_t together, int64_t activation, Result y, Result mean, Result variance) {
  const Groups rows(x.dimensions());
  const int64_t channels = rows.channels, some = std::min<int64_t>(channels, LANES);
  moments(pool, rows, x.typed_data(), together, mean->typed_data(), variance->typed_data());
  std::vector<float> slopes(rows.groups * channels), shifts(slopes.size());
  float deviation = 1;
  for (int64_t i = 0; i < rows.groups * channels; ++i) {
    const int64_t place = together ? i / channels : i, c = i % channels;
    if (!together || c == 0) deviation = std::sqrt(variance->typed_data()[place] + epsilon);
    slopes[i] = scale.typed_data()[c] / deviation;
    shifts[i] = bias.typed_data()[c] - mean->typed_data()[place] * slopes[i];
  }
  with(activation, [&](auto kind) {
    parallel(pool, rows.units(), [&](int64_t unit) {
      for_all(rows, unit, [&](int64_t place, int64_t at) {
        const Vector value = load(x.typed_data() + place, some);
        const Vector u = value * load(&slopes[at], some) + load(&shifts[at], some);
        store(y->typed_data() + place, activate<decltype(kind)::value>(u), some);
      });
    });
  });
  return ffi::Error::Success();
}

// Each row of x normalised by its own mean and variance, times a scale, plus a bias.
ffi::Error layer_norm(ffi::ThreadPool pool, Floats x, Floats scale, Floats bias, float epsilon,
                      Result y) {
  const int64_t rows = x.dimensions()[0], channels = x.dimensions()[1];
  const int64_t chunk = std::max<int64_t>(8192 / channels, 1);
  parallel(pool, ceil_div(rows, chunk), [&](int64_t unit) {
    for (int64_t r = unit * chunk; r < std::min((unit + 1) * chunk, rows); ++r) {
      const float* from = x.typed_data() + r * channels;
      Vector sum{}, square{};
      for (int64_t c = 0; c < channels; c += LANES) sum += load(from + c, channels - c);
      const float mean = total(sum) / channels;
      for (int64_t c = 0; c < channels; c += LANES) {
        const Vector distance = load(from + c, channels - c) - mean;
        const Vector counted = load(reinterpret_cast<const float*>(&distance), channels - c);
        square += counted * counted;
      }
      const float inverse = 1 / std::sqrt(total(square) / channels + epsilon);
      for (int64_t c = 0; c < channels; c += LANES) {
        const int64_t count = channels - c;
        const Vector unit_value = (load(from + c, count) - mean) * inverse;
        const Vector value = unit_value * load(scale.typed_data() + c, count) +
                             load(bias.typed_data() + c, count);
        store(y->typed_data() + r * channels + c, value, count);
      }
    }
  });
  return ffi::Error::Success();
}

// With g = cotangent * activation'(x * scale + shift): the sums of g and of
// g * (x - mean) * deviation over the rows of each group, in one array (2, g, c).
ffi::Error norm_gradient_sums(ffi::ThreadPool pool, Floats x, Floats cotangent, Floats scale,
                              Floats shift, Floats mean, Floats deviation, int64_t activation,
                              Result to) {
  const Groups rows(x.dimensions());
  const int64_t channels = rows.channels, some = std::min<int64_t>(channels, LANES);
  const int64_t half = rows.units() * channels;
  std::vector<float> sums(2 * half);
  with(activation, [&](auto kind) {
    parallel(pool, rows.units(), [&](int64_t unit) {
      for (int64_t block = 0; block < ceil_div(channels, LANES); ++block) {
        const int64_t c = begin_of(block, channels), at = unit / rows.chunks * channels + c;
        const Vector times = load(scale.typed_data() + at, some);
        const Vector plus = load(shift.typed_data() + at, some);
        const Vector middle = load(mean.typed_data() + at, some);
        const Vector inverse = load(deviation.typed_data() + at, some);
        Vector products[2] = {};
        int turn = 0;
        const Vector sum = sum_of(rows, unit, c, [&](int64_t place) {
          const Vector value = load(x.typed_data() + place, some);
          Vector g = load(cotangent.typed_data() + place, some);
          g *= slope<decltype(kind)::value>(value * times + plus);
          products[turn] += g * (value - middle);
          turn = 1 - turn;
          return g;
        });
        store(&sums[unit * channels + c], sum, some);
        store(&sums[half + unit * channels + c], (products[0] + products[1]) * inverse, some);
      }
    });
  });
  for (int64_t which = 0; which < 2; ++which)
    for (int64_t group = 0; group < rows.groups; ++group)
      for (int64_t c = 0; c < channels; ++c) {
        double total = 0;
        for (int64_t unit = group * rows.chunks; unit < (group + 1) * rows.chunks; ++unit)
          total += sums[which * half + unit * channels + c];
        to->typed_data()[(which * rows.groups + group) * channels + c] = static_cast<float>(total);
      }
  return ffi::Error::Success();
}

// to = g * of_g + x * of_x + rest, with g as above.
ffi::Error norm_gradient(ffi::ThreadPool pool, Floats x, Floats cotangent, Floats scale,
                         Floats shift, Floats of_g, Floats of_x, Floats rest, int64_t activation,
                         Result to) {
  const Groups rows(x.dimensions());
  const int64_t some = std::min<int64_t>(rows.channels, LANES);
  with(activation, [&](auto kind) {
    parallel(pool, rows.units(), [&](int64_t unit) {
      for_all(rows, unit, [&](int64_t place, int64_t at) {
        const auto of = [&](const Floats& values) { return load(values.typed_data() + at, some); };
        const Vector value = load(x.typed_data() + place, some);
        Vector g = load(cotangent.typed_data() + place, some);
        g *= slope<decltype(kind)::value>(value * of(scale) + of(shift));
        store(to->typed_data() + place, g * of(of_g) + value * of(of_x) + of(rest), some);
      });
    });
  });
  return ffi::Error::Success();
}

}  // namespace

// --- what kernels.py calls -----------------------------------------------------------------------

extern "C" void begin_program() { ++programs; }
extern "C" void end_program() { --programs; }

// The same for what the calling thread does itself.
namespace {
thread_local std::optional<Seat> work_seat;
}
extern "C" void begin_work() {
  begin_program();
  work_seat.emplace();
}
extern "C" void end_work() {
  work_seat.reset();
  end_program();
}

// --- what XLA calls ------------------------------------------------------------------------------

#define CALL ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()
#define IN .Arg<Floats>()
#define OUT .Ret<Floats>()
#define NUMBER(name) .Attr<int64_t>(name)
#define FLOAT(name) .Attr<float>(name)

XLA_FFI_DEFINE_HANDLER_SYMBOL(Matmul, matmul, CALL IN IN IN IN IN NUMBER("activation") OUT);
XLA_FFI_DEFINE_HANDLER_SYMBOL(MatmulKernelGradient, matmul_kernel_gradient, CALL IN IN OUT);
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    Convolution, convolution,
    CALL IN IN IN IN IN NUMBER("stride") NUMBER("dilation") NUMBER("activation") OUT);
XLA_FFI_DEFINE_HANDLER_SYMBOL(ConvolutionKernelGradient, convolution_kernel_gradient,
                              CALL IN IN NUMBER("stride") NUMBER("dilation") OUT);
XLA_FFI_DEFINE_HANDLER_SYMBOL(Attention, attention, CALL IN NUMBER("heads") OUT);
XLA_FFI_DEFINE_HANDLER_SYMBOL(SeparableContext, separable_context, CALL IN IN IN OUT);
XLA_FFI_DEFINE_HANDLER_SYMBOL(SeparableValues, separable_values, CALL IN IN IN IN OUT);
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    Depthwise, depthwise,
    CALL IN IN IN IN IN NUMBER("stride") NUMBER("dilation") NUMBER("activation") OUT);
XLA_FFI_DEFINE_HANDLER_SYMBOL(InvertedResidual, inverted_residual,
                              CALL IN IN IN IN IN IN IN IN IN IN NUMBER("stride")
                                  NUMBER("activation") NUMBER("residual") OUT);
XLA_FFI_DEFINE_HANDLER_SYMBOL(DepthwiseInputGradient, depthwise_input_gradient,
                              CALL IN IN NUMBER("stride") NUMBER("dilation") OUT);
XLA_FFI_DEFINE_HANDLER_SYMBOL(DepthwiseKernelGradient, depthwise_kernel_gradient,
                              CALL IN IN NUMBER("stride") NUMBER("dilation") OUT);
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    Norm, norm,
    CALL IN IN IN FLOAT("epsilon") NUMBER("together") NUMBER("activation") OUT OUT OUT);
XLA_FFI_DEFINE_HANDLER_SYMBOL(LayerNorm, layer_norm, CALL IN IN IN FLOAT("epsilon") OUT);
XLA_FFI_DEFINE_HANDLER_SYMBOL(NormGradientSums, norm_gradient_sums,
                              CALL IN IN IN IN IN IN NUMBER("activation") OUT);
XLA_FFI_DEFINE_HANDLER_SYMBOL(NormGradient, norm_gradient,
                              CALL IN IN IN IN IN IN IN NUMBER("activation") OUT);
