/* Pillow's resampling of 8-bit RGB pictures, bit for bit, several pixels at a time.
 *
 * Each output pixel is a weighted sum of neighbours: first along the rows, then along the columns,
 * rounded to 8 bits in between. Weights are computed in double precision and rounded to 22 bits
 * behind the point; the sums are exact in 32 bits (Pillow 13, src/libImaging/Resample.c, has the
 * same arithmetic: a compiler must not fuse products and sums of the weights, -ffp-contract=off).
 *
 * Along the rows, a few of them are laid side by side, 4 bytes a pixel, so that one vector holds
 * one pixel of each: all have the same weight.
 */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifndef __AVX2__
#error "it wants AVX2: with shorter vectors Pillow is faster"
#endif
#include <immintrin.h>

#define BITS 22 /* of a weight behind the point */
#ifdef __AVX512F__
#define WIDE 16 /* numbers of a vector */
#else
#define WIDE 8
#endif
#define SIDE (WIDE / 4) /* rows at a time */

typedef int32_t Ints __attribute__((vector_size(4 * WIDE)));
typedef uint8_t Bytes __attribute__((vector_size(WIDE)));

/* The weights along one axis: output i is made of the `taps` inputs from `first[i]` on, with the
 * weights from `weight + i * taps` on. */
typedef struct {
  int64_t taps;
  int32_t *first, *weight;
} Axis;

static double triangle(double x) {
  x = fabs(x);
  return x < 1.0 ? 1.0 - x : 0.0;
}

static double cubic(double x) { /* Keys' with a = -1/2 */
  const double a = -0.5;
  x = fabs(x);
  if (x < 1.0) return ((a + 2.0) * x - (a + 3.0)) * x * x + 1;
  if (x < 2.0) return (((x - 5) * x + 8) * x - 4) * a;
  return 0.0;
}

static double sinc(double x) {
  if (x == 0.0) return 1.0;
  x *= M_PI;
  return sin(x) / x;
}

static double lanczos(double x) { return -3.0 <= x && x < 3.0 ? sinc(x) * sinc(x / 3) : 0.0; }

/* The inputs from *first up to *last that a filter reaches around `center`. */
static void reached(double center, double support, int64_t in, int64_t* first, int64_t* last) {
  *first = (int64_t)(center - support + 0.5);
  *last = (int64_t)(center + support + 0.5);
  *first = *first < 0 ? 0 : *first;
  *last = *last > in ? in : *last;
}

static int begin(Axis* axis, int64_t in, float low, float high, int64_t out, int reach) {
  double (*const filter)(double) = reach == 1 ? triangle : reach == 2 ? cubic : lanczos;
  const double scale = (double)(high - low) / out, stretch = scale < 1.0 ? 1.0 : scale;
  const double support = reach * stretch, shrink = 1.0 / stretch;
  int64_t first, last;
  axis->taps = 0;
  for (int64_t i = 0; i < out; ++i) {
    reached(low + (i + 0.5) * scale, support, in, &first, &last);
    axis->taps = last - first > axis->taps ? last - first : axis->taps;
  }
  axis->first = calloc(out, (1 + axis->taps) * sizeof(int32_t));
  double* exact = malloc(sizeof(double) * axis->taps);
  if (!axis->first || !exact) {
    free(exact);
    return 0;
  }
  axis->weight = axis->first + out;
  for (int64_t i = 0; i < out; ++i) {
    const double center = low + (i + 0.5) * scale;
    reached(center, support, in, &first, &last);
    double sum = 0.0;
    for (int64_t k = 0; k < last - first; ++k) {
      exact[k] = filter((k + first - center + 0.5) * shrink);
      sum += exact[k];
    }
    /* All have as many taps, some of weight 0: loops of one length are faster. */
    const int64_t from = first + axis->taps > in ? in - axis->taps : first;
    int32_t* weight = axis->weight + i * axis->taps + (first - from);
    for (int64_t k = 0; k < last - first; ++k) {
      const double each = (sum != 0.0 ? exact[k] / sum : exact[k]) * (1 << BITS);
      weight[k] = (int32_t)(each < 0 ? each - 0.5 : each + 0.5);
    }
    axis->first[i] = (int32_t)from;
  }
  free(exact);
  return 1;
}

/* By name: __builtin_convertvector becomes code of GCC 12 that works number by number here. */
static inline Ints widened(const uint8_t* from) {
#ifdef __AVX512F__
  return (Ints)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)from));
#else
  return (Ints)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)from));
#endif
}

/* Sums as bytes: rounded (a half was in them from the start), and none below 0 or above 255. */
static inline Bytes narrowed(Ints sums) {
  sums >>= BITS;
#ifdef __AVX512F__
  sums &= ~(sums >> 31);
  sums |= (255 - sums) >> 31;
  return __builtin_convertvector(sums & 255, Bytes);
#else
  const __m256i ints = (__m256i)sums;
  __m128i bytes = _mm_packs_epi32(_mm256_castsi256_si128(ints), _mm256_extracti128_si256(ints, 1));
  bytes = _mm_packus_epi16(bytes, bytes);
  Bytes result;
  memcpy(&result, &bytes, sizeof result);
  return result;
#endif
}

static const int32_t HALF = 1 << (BITS - 1);

/* Along the rows, into rows of `stride` bytes, at least one more than they need. `beside` has room
 * for SIDE rows of `width`. */
static void across(const uint8_t* in, int64_t in_stride, int64_t height, int64_t width, Axis axis,
                   int64_t count, uint8_t* out, int64_t stride, uint8_t* beside) {
  for (int64_t top = 0; top < height; top += SIDE) {
    uint8_t* rows[SIDE];
    for (int64_t r = 0; r < SIDE; ++r) {
      /* Behind the last row there are none: it stands in for them, and is written again. */
      const int64_t y = top + r < height ? top + r : height - 1;
      const uint8_t* row = in + in_stride * y;
      for (int64_t x = 0; x < width - 1; ++x) memcpy(beside + WIDE * x + 4 * r, row + 3 * x, 4);
      memcpy(beside + WIDE * (width - 1) + 4 * r, row + 3 * (width - 1), 3);
      rows[r] = out + stride * y;
    }
    for (int64_t x = 0; x < count; ++x) {
      const int32_t* weight = axis.weight + x * axis.taps;
      const uint8_t* from = beside + WIDE * axis.first[x];
      Ints sums = HALF - (Ints){};
      for (int64_t k = 0; k < axis.taps; ++k) sums += widened(from + WIDE * k) * weight[k];
      const Bytes bytes = narrowed(sums);
      /* The fourth byte is the next pixel's, which overwrites it. */
      for (int64_t r = 0; r < SIDE; ++r) memcpy(rows[r] + 3 * x, (const uint8_t*)&bytes + 4 * r, 4);
    }
  }
}

/* One vector of the sums along the columns. */
static inline Bytes column(const uint8_t* from, int64_t stride, const int32_t* weight,
                           int64_t taps) {
  Ints sums = HALF - (Ints){};
  for (int64_t k = 0; k < taps; ++k) sums += widened(from + stride * k) * weight[k];
  return narrowed(sums);
}

/* Along the columns; rows of `in` are `stride` bytes long, whole vectors. */
static void down(const uint8_t* in, int64_t stride, Axis axis, int64_t count, uint8_t* out,
                 int64_t row) {
  for (int64_t y = 0; y < count; ++y) {
    const int32_t* weight = axis.weight + y * axis.taps;
    const uint8_t* from = in + stride * axis.first[y];
    int64_t x = 0;
    for (; x + WIDE <= row; x += WIDE) {
      const Bytes bytes = column(from + x, stride, weight, axis.taps);
      memcpy(out + row * y + x, &bytes, WIDE);
    }
    const Bytes bytes = column(from + x, stride, weight, axis.taps);
    memcpy(out + row * y + x, &bytes, row - x);
  }
}

/* Resamples `height` rows of `width` RGB pixels, `in_stride` bytes from row to row, to `out_height`
 * rows of `out_width`, from the box between `box` = left, top, right and bottom. `reach` is that of
 * the filter: 1 bilinear, 2 bicubic, 3 Lanczos. Returns 0 where there is no memory. */
int resample(const uint8_t* in, int64_t in_stride, int64_t height, int64_t width,
             const float* box, int reach, uint8_t* out, int64_t out_height, int64_t out_width) {
  const int64_t row = 3 * out_width, stride = (row + WIDE) / WIDE * WIDE;
  Axis columns = {0}, rows = {0};
  uint8_t* between = malloc(stride * height + WIDE * width);
  const int enough = between && begin(&columns, width, box[0], box[2], out_width, reach) &&
                     begin(&rows, height, box[1], box[3], out_height, reach);
  if (enough) {
    across(in, in_stride, height, width, columns, out_width, between, stride,
           between + stride * height);
    down(between, stride, rows, out_height, out, row);
  }
  free(columns.first);
  free(rows.first);
  free(between);
  return enough;
}
