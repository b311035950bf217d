// The kernels, written once for all layouts, storage types and instruction sets. Compiled with -DGN_GLUON_ISA=avx512,
// avx2 and baseline, each with its flags.
//
// A column is what one register walks along: for plain NCHW the pixels of one channel, kLanes at a time; for the other
// layouts kLanes neighbouring channels, one pixel at a time, `stride` elements apart. Where a pixel's channels go on
// beyond one register (nhwc), a block of several columns is walked together, a cache line at a time.
//
// A unit is the least number of whole groups that are whole blocks too. It is read from memory once, for the moments;
// a unit of usual networks then still lies in the core's own cache when it is normalized.
//
// Moments: two passes inside pieces that lie in the first-level cache, pieces merged in double (Chan et al. 1979).
#include <omp.h>

#include "group_norm.h"
#include "lanes.h"

namespace {

using gn_gluon::Backward;
using gn_gluon::Forward;
using gn_gluon::Shape;

constexpr int64_t kPiece = 4096;     // values of one piece of the moments: 16 KB of float32
constexpr int64_t kSumPiece = 1024;  // values that are summed in float32 before the sum goes on in double

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

inline int64_t greatest_common_divisor(int64_t a, int64_t b) {
  while (b) {
    const int64_t rest = a % b;
    a = b;
    b = rest;
  }
  return a;
}

struct Moments {
  double count, mean, m2;  // m2: sum of squared distances from the mean

  void merge(const Moments& other) {
    if (other.count == 0) return;
    const double total = count + other.count, delta = other.mean - mean, share = other.count / total;
    mean += delta * share;
    m2 += other.m2 + delta * delta * count * share;
    count = total;
  }
};

// ------------------------------------------------------------------------------------------- geometry

struct Geometry {
  int64_t channels, pixels, period;
  int64_t group_channels;   // C / G
  int64_t width;            // channels of a block: 1 (plain), or kLanes * columns
  int64_t unit_channels;    // of a unit: a multiple of width and of group_channels
  int64_t units;            // of all samples
  int64_t sample_units;
  int64_t segment_channels; // of a segment, the share of a unit that one thread may take

  Geometry(const Shape& shape, int64_t period, int columns)
      : channels(shape.channels), pixels(shape.pixels), period(period),
        group_channels(shape.channels / shape.groups), width(period == 1 ? 1 : kLanes * columns) {
    unit_channels = width / greatest_common_divisor(width, group_channels) * group_channels;
    sample_units = channels / unit_channels;
    units = shape.samples * sample_units;
    segment_channels = period == 1 ? most(1, least(unit_channels, 4 * kPiece / most(1, pixels))) : width;
  }

  int64_t offset(int64_t sample, int64_t channel) const {
    return (sample * channels + channel - channel % period) * pixels + channel % period;
  }
  // A column: so many registers of values, `stride` apart, and after them the rest of a plain channel's pixels.
  template <bool kPlain> int64_t stride() const { return kPlain ? kLanes : period; }
  template <bool kPlain> int64_t vectors() const { return kPlain ? pixels / kLanes : pixels; }
  template <bool kPlain> int rest() const { return kPlain ? pixels % kLanes : 0; }
  int64_t segments() const { return (unit_channels + segment_channels - 1) / segment_channels; }
};

// How many columns make a cache line, where a period has them.
template <typename T>
int columns_of_block(const Shape& shape, int64_t period) {
  constexpr int kLine = 64 / (kLanes * sizeof(T));
  const int64_t wide = kLanes * kLine;
  if (period == 1 || period % wide || shape.channels % wide) return 1;
  const int64_t group = shape.channels / shape.groups, unit = wide / greatest_common_divisor(wide, group) * group;
  return shape.channels % unit ? 1 : kLine;
}

// What a unit's channels need between the passes, one array each so that Lanes of neighbouring channels load at once.
struct Scratch {
  Moments* moments;
  float *mean, *scale, *shift;                   // y = (x - mean) * scale + shift
  float *from_dy, *from_x, *constant;            // dx = dy * from_dy + ((x - mean) * from_x + constant)
  float *sum_dy, *sum_dy_x;                      // sums of dy and of dy * (x - mean)

  static_assert(gn_gluon::kScratchBytes == sizeof(Moments) + 8 * sizeof(float), "a channel's share of Scratch");

  Scratch(char* memory, int64_t channels) : moments(reinterpret_cast<Moments*>(memory)) {
    float* next = reinterpret_cast<float*>(moments + channels);
    float** const arrays[] = {&mean, &scale, &shift, &from_dy, &from_x, &constant, &sum_dy, &sum_dy_x};
    for (float** array : arrays) {
      *array = next;
      next += channels;
    }
  }
};

// A coefficient of the columns of a block: that of one channel in every lane (plain), or one channel per lane.
template <bool kPlain>
inline Lanes coefficient(const float* of_channels, int column) {
  return kPlain ? broadcast(*of_channels) : load(of_channels + column * kLanes);
}

// What makes y of x in the columns of a block: centred(x) * scale + shift.
template <bool kPlain, int kColumns>
struct Affine {
  Lanes mean[kColumns], scale[kColumns], shift[kColumns];

  Affine(const Scratch& scratch, int64_t channel) {
    for (int c = 0; c < kColumns; ++c) {
      mean[c] = coefficient<kPlain>(scratch.mean + channel, c);
      scale[c] = coefficient<kPlain>(scratch.scale + channel, c);
      shift[c] = coefficient<kPlain>(scratch.shift + channel, c);
    }
  }
  Lanes operator()(Lanes centred, int c) const { return centred * scale[c] + shift[c]; }
};

// ------------------------------------------------------------------------------------------- first pass, forward

template <typename T>
Moments moments_of_few(const T* x, int count) {
  float values[kLanes];
  store(values, load(x, count));
  double sum = 0, m2 = 0;
  for (int i = 0; i < count; ++i) sum += values[i];
  for (int i = 0; i < count; ++i) m2 += (values[i] - sum / count) * (values[i] - sum / count);
  return Moments{static_cast<double>(count), sum / count, m2};
}

// Moments of each lane over `vectors` registers; out: (kColumns * kLanes).
template <typename T, int kColumns>
void lane_moments(const T* x, int64_t vectors, int64_t stride, Moments* out) {
  constexpr int kChains = kColumns == 1 ? 4 : 2;  // independent sums hide the latency of an addition
  double means[kColumns * kLanes] = {}, m2s[kColumns * kLanes] = {}, count = 0;
  for (int64_t start = 0; start < vectors; start += kPiece / (kColumns * kLanes)) {
    const int64_t size = least(kPiece / (kColumns * kLanes), vectors - start);
    const T* piece = x + start * stride;
    Lanes sums[kChains][kColumns] = {}, squares[kChains][kColumns] = {}, centres[kColumns];
    int64_t i = 0;
    for (; i + kChains <= size; i += kChains)
      for (int chain = 0; chain < kChains; ++chain)
        for (int c = 0; c < kColumns; ++c) sums[chain][c] += load(piece + (i + chain) * stride + c * kLanes);
    for (; i < size; ++i)
      for (int c = 0; c < kColumns; ++c) sums[0][c] += load(piece + i * stride + c * kLanes);
    for (int c = 0; c < kColumns; ++c) {
      for (int chain = 1; chain < kChains; ++chain) sums[0][c] += sums[chain][c];
      centres[c] = sums[0][c] * broadcast(1.f / size);
    }
    for (int chain = 0; chain < kChains; ++chain)
      for (int c = 0; c < kColumns; ++c) sums[chain][c] = Lanes{};
    for (i = 0; i + kChains <= size; i += kChains)
      for (int chain = 0; chain < kChains; ++chain)
        for (int c = 0; c < kColumns; ++c) {
          const Lanes distance = load(piece + (i + chain) * stride + c * kLanes) - centres[c];
          sums[chain][c] += distance;
          squares[chain][c] += distance * distance;
        }
    for (; i < size; ++i)
      for (int c = 0; c < kColumns; ++c) {
        const Lanes distance = load(piece + i * stride + c * kLanes) - centres[c];
        sums[0][c] += distance;
        squares[0][c] += distance * distance;
      }
    const double share = size / (count + size), weight = count * share;
    for (int c = 0; c < kColumns; ++c) {
      for (int chain = 1; chain < kChains; ++chain) {
        sums[0][c] += sums[chain][c];
        squares[0][c] += squares[chain][c];
      }
      for (int lane = 0; lane < kLanes; ++lane) {
        const double sum = sums[0][c][lane], rest = squares[0][c][lane] - sum * sum / size;
        const double delta = centres[c][lane] + sum / size - means[c * kLanes + lane];
        means[c * kLanes + lane] += delta * share;
        m2s[c * kLanes + lane] += (rest > 0 ? rest : 0) + delta * delta * weight;
      }
    }
    count += size;
  }
  for (int lane = 0; lane < kColumns * kLanes; ++lane) out[lane] = Moments{count, means[lane], m2s[lane]};
}

// Moments of the channels [first, last) of a unit. Plain: all of them together, since they belong to one group.
template <typename T, bool kPlain, int kColumns>
void segment_moments(const Geometry& geometry, const T* x, int64_t sample, int64_t unit_channel, int64_t first,
                     int64_t last, const Scratch& scratch) {
  const T* from = x + geometry.offset(sample, unit_channel + first);
  if (!kPlain) {
    for (int64_t channel = first; channel < last; channel += geometry.width)
      lane_moments<T, kColumns>(x + geometry.offset(sample, unit_channel + channel), geometry.pixels, geometry.period,
                                scratch.moments + channel);
    return;
  }
  const int64_t values = (last - first) * geometry.pixels;
  const int rest = values % kLanes;
  Moments lanes[kLanes], all = {};
  lane_moments<T, 1>(from, values / kLanes, kLanes, lanes);
  for (int lane = 0; lane < kLanes; ++lane) all.merge(lanes[lane]);
  if (rest) all.merge(moments_of_few(from + values - rest, rest));
  scratch.moments[first] = all;
  for (int64_t channel = first + 1; channel < last; ++channel) scratch.moments[channel] = Moments{};
}

// ------------------------------------------------------------------------------------------- between the passes

// The sum that two float32 hold of a double.
inline double split(double value, float* high, float* low) {
  *high = static_cast<float>(value);
  *low = __builtin_isfinite(value) ? static_cast<float>(value - *high) : 0.f;
  return static_cast<double>(*high) + *low;
}

struct Statistics {
  double rest_of_mean, rstd;  // mean = float32 mean + rest
  float mean;
};

inline void affine(const Statistics& group, float gamma, float beta, float* scale, float* shift) {
  const double factor = group.rstd * gamma;
  *scale = static_cast<float>(factor);
  *shift = static_cast<float>(beta - group.rest_of_mean * factor);
}

void finish_moments(const Shape& shape, const Geometry& geometry, const Forward& a, int64_t sample,
                    int64_t unit_channel, const Scratch& scratch) {
  const int64_t all = shape.samples * shape.groups;
  for (int64_t first = 0; first < geometry.unit_channels; first += geometry.group_channels) {
    const int64_t index = sample * shape.groups + (unit_channel + first) / geometry.group_channels;
    Moments group = {};
    for (int64_t i = 0; i < geometry.group_channels; ++i) group.merge(scratch.moments[first + i]);
    Statistics statistics;
    const double mean = split(group.mean, a.mean + index, a.mean + all + index);
    statistics.mean = a.mean[index];
    statistics.rest_of_mean = mean - statistics.mean;
    const double rstd = 1 / __builtin_sqrt(group.m2 / group.count + shape.epsilon);
    statistics.rstd = split(rstd, a.rstd + index, a.rstd + all + index);
    for (int64_t channel = first; channel < first + geometry.group_channels; ++channel) {
      scratch.mean[channel] = statistics.mean;
      affine(statistics, a.gamma[unit_channel + channel], a.beta[unit_channel + channel], scratch.scale + channel,
             scratch.shift + channel);
    }
  }
}

// ------------------------------------------------------------------------------------------- second pass, forward

template <typename T, bool kPlain, int kColumns, bool kRelu, bool kResidual>
void normalize_block(const Geometry& geometry, const T* x, const T* residual, T* y, const Scratch& scratch,
                     int64_t channel) {
  const Affine<kPlain, kColumns> to_y(scratch, channel);
  const int64_t stride = geometry.stride<kPlain>(), vectors = geometry.vectors<kPlain>();
  for (int64_t i = 0; i < vectors; ++i)
    for (int c = 0; c < kColumns; ++c) {
      const int64_t at = i * stride + c * kLanes;
      Lanes value = to_y(load(x + at) - to_y.mean[c], c);
      if (kResidual) value += load(residual + at);
      store(y + at, kRelu ? relu(value) : value);
    }
  const int rest = geometry.rest<kPlain>();
  if (rest) {
    const int64_t at = vectors * kLanes;
    Lanes value = to_y(load(x + at, rest) - to_y.mean[0], 0);
    if (kResidual) value += load(residual + at, rest);
    store(y + at, kRelu ? relu(value) : value, rest);
  }
}

template <typename T, bool kPlain, int kColumns, bool kRelu, bool kResidual>
void normalize_segment(const Geometry& geometry, const Forward& a, int64_t sample, int64_t unit_channel, int64_t first,
                       int64_t last, const Scratch& scratch) {
  for (int64_t channel = first; channel < last; channel += geometry.width) {
    const int64_t at = geometry.offset(sample, unit_channel + channel);
    normalize_block<T, kPlain, kColumns, kRelu, kResidual>(
        geometry, static_cast<const T*>(a.x) + at, static_cast<const T*>(kResidual ? a.residual : a.x) + at,
        static_cast<T*>(a.y) + at, scratch, channel);
  }
}

// ------------------------------------------------------------------------------------------- first pass, backward

// dy where y > 0. Without a residual the sign of y is that of its own formula, one array less to read.
template <bool kRelu, bool kResidual, typename Affine, typename T, typename... Count>
inline Lanes masked(Lanes dy, Lanes centred, const Affine& to_y, int c, const T* y, Count... count) {
  if (!kRelu) return dy;
  return positive(dy, kResidual ? load(y, count...) : to_y(centred, c));
}

template <typename T, bool kPlain, int kColumns, bool kRelu, bool kResidual>
void sum_block(const Geometry& geometry, const T* dy, const T* x, const T* y, const Scratch& scratch,
               int64_t channel) {
  constexpr int kChains = kColumns == 1 ? 2 : 1;
  const Affine<kPlain, kColumns> to_y(scratch, channel);
  const int64_t stride = geometry.stride<kPlain>(), vectors = geometry.vectors<kPlain>();
  double sums[kColumns * kLanes] = {}, products[kColumns * kLanes] = {};
  for (int64_t start = 0; start < vectors; start += kSumPiece / (kColumns * kLanes)) {
    const int64_t end = least(start + kSumPiece / (kColumns * kLanes), vectors);
    Lanes sum[kChains][kColumns] = {}, product[kChains][kColumns] = {};
    int64_t i = start;
    for (; i + kChains <= end; i += kChains)
      for (int chain = 0; chain < kChains; ++chain)
        for (int c = 0; c < kColumns; ++c) {
          const int64_t at = (i + chain) * stride + c * kLanes;
          const Lanes centred = load(x + at) - to_y.mean[c];
          const Lanes slope = masked<kRelu, kResidual>(load(dy + at), centred, to_y, c, y + at);
          sum[chain][c] += slope;
          product[chain][c] += slope * centred;
        }
    for (; i < end; ++i)
      for (int c = 0; c < kColumns; ++c) {
        const int64_t at = i * stride + c * kLanes;
        const Lanes centred = load(x + at) - to_y.mean[c];
        const Lanes slope = masked<kRelu, kResidual>(load(dy + at), centred, to_y, c, y + at);
        sum[0][c] += slope;
        product[0][c] += slope * centred;
      }
    for (int c = 0; c < kColumns; ++c)
      for (int lane = 0; lane < kLanes; ++lane)
        for (int chain = 0; chain < kChains; ++chain) {
          sums[c * kLanes + lane] += sum[chain][c][lane];
          products[c * kLanes + lane] += product[chain][c][lane];
        }
  }
  if (!kPlain) {
    for (int i = 0; i < kColumns * kLanes; ++i) {
      scratch.sum_dy[channel + i] = static_cast<float>(sums[i]);
      scratch.sum_dy_x[channel + i] = static_cast<float>(products[i]);
    }
    return;
  }
  double sum = 0, product = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    sum += sums[lane];
    product += products[lane];
  }
  const int rest = geometry.rest<kPlain>();
  if (rest) {
    const int64_t at = vectors * kLanes;
    const Lanes centred = load(x + at, rest) - to_y.mean[0];
    const Lanes slope = masked<kRelu, kResidual>(load(dy + at, rest), centred, to_y, 0, y + at, rest);
    for (int lane = 0; lane < rest; ++lane) {
      sum += slope[lane];
      product += static_cast<double>(slope[lane]) * centred[lane];
    }
  }
  scratch.sum_dy[channel] = static_cast<float>(sum);
  scratch.sum_dy_x[channel] = static_cast<float>(product);
}

// ------------------------------------------------------------------------------------------- between the passes

inline Statistics statistics_of(const Shape& shape, const Backward& a, int64_t index) {
  const int64_t all = shape.samples * shape.groups;
  return Statistics{a.mean[all + index], static_cast<double>(a.rstd[index]) + a.rstd[all + index], a.mean[index]};
}

void load_statistics(const Shape& shape, const Geometry& geometry, const Backward& a, int64_t sample,
                     int64_t unit_channel, int64_t first, int64_t last, const Scratch& scratch) {
  for (int64_t channel = first; channel < last; ++channel) {
    const Statistics group = statistics_of(
        shape, a, sample * shape.groups + (unit_channel + channel) / geometry.group_channels);
    scratch.mean[channel] = group.mean;
    affine(group, a.gamma[unit_channel + channel], a.beta[unit_channel + channel], scratch.scale + channel,
           scratch.shift + channel);
  }
}

// With d = dy masked, x_hat = (x - mean) * rstd and averages over the group (Wu & He leave it to the framework):
//   dx = rstd * (gamma * d - average(gamma * d) - x_hat * average(gamma * d * x_hat))
// parts: the sample's part of dgamma and dbeta, (2, channels).
void finish_sums(const Shape& shape, const Geometry& geometry, const Backward& a, int64_t sample,
                 int64_t unit_channel, const Scratch& scratch, float* parts) {
  const double values = static_cast<double>(geometry.group_channels) * geometry.pixels;
  for (int64_t first = 0; first < geometry.unit_channels; first += geometry.group_channels) {
    const Statistics group = statistics_of(
        shape, a, sample * shape.groups + (unit_channel + first) / geometry.group_channels);
    double average = 0, slope = 0;
    for (int64_t channel = first; channel < first + geometry.group_channels; ++channel) {
      const double sum = scratch.sum_dy[channel], product = scratch.sum_dy_x[channel] - group.rest_of_mean * sum;
      const double gamma = a.gamma[unit_channel + channel];
      parts[unit_channel + channel] = static_cast<float>(product * group.rstd);
      parts[geometry.channels + unit_channel + channel] = static_cast<float>(sum);
      average += gamma * sum / values;
      slope += gamma * product / values;
    }
    // The gradient of a single value is zero; the formula would leave the rounding error of its terms.
    const double rstd = values > 1 ? group.rstd : 0;
    const double from_x = -rstd * rstd * rstd * slope;
    const double constant = -rstd * average - from_x * group.rest_of_mean;
    for (int64_t channel = first; channel < first + geometry.group_channels; ++channel) {
      scratch.from_dy[channel] = static_cast<float>(rstd * a.gamma[unit_channel + channel]);
      scratch.from_x[channel] = static_cast<float>(from_x);
      scratch.constant[channel] = static_cast<float>(constant);
    }
  }
}

// ------------------------------------------------------------------------------------------- second pass, backward

template <typename T, bool kPlain, int kColumns, bool kRelu, bool kResidual>
void gradient_block(const Geometry& geometry, const T* dy, const T* x, const T* y, T* dx, T* dresidual, bool add_dx,
                    bool add_dresidual, const Scratch& scratch, int64_t channel) {
  const Affine<kPlain, kColumns> to_y(scratch, channel);
  Lanes from_dy[kColumns], from_x[kColumns], constant[kColumns];
  for (int c = 0; c < kColumns; ++c) {
    from_dy[c] = coefficient<kPlain>(scratch.from_dy + channel, c);
    from_x[c] = coefficient<kPlain>(scratch.from_x + channel, c);
    constant[c] = coefficient<kPlain>(scratch.constant + channel, c);
  }
  const int64_t stride = geometry.stride<kPlain>(), vectors = geometry.vectors<kPlain>();
  for (int64_t i = 0; i < vectors; ++i)
    for (int c = 0; c < kColumns; ++c) {
      const int64_t at = i * stride + c * kLanes;
      const Lanes centred = load(x + at) - to_y.mean[c];
      const Lanes slope = masked<kRelu, kResidual>(load(dy + at), centred, to_y, c, y + at);
      if (kResidual && dresidual) store(dresidual + at, add_dresidual ? load(dresidual + at) + slope : slope);
      if (dx) {
        const Lanes gradient = slope * from_dy[c] + (centred * from_x[c] + constant[c]);
        store(dx + at, add_dx ? load(dx + at) + gradient : gradient);
      }
    }
  const int rest = geometry.rest<kPlain>();
  if (rest) {
    const int64_t at = vectors * kLanes;
    const Lanes centred = load(x + at, rest) - to_y.mean[0];
    const Lanes slope = masked<kRelu, kResidual>(load(dy + at, rest), centred, to_y, 0, y + at, rest);
    if (kResidual && dresidual)
      store(dresidual + at, add_dresidual ? load(dresidual + at, rest) + slope : slope, rest);
    if (dx) {
      const Lanes gradient = slope * from_dy[0] + (centred * from_x[0] + constant[0]);
      store(dx + at, add_dx ? load(dx + at, rest) + gradient : gradient, rest);
    }
  }
}

template <typename T, bool kPlain, int kColumns, bool kRelu, bool kResidual>
void sum_segment(const Geometry& geometry, const Backward& a, int64_t sample, int64_t unit_channel, int64_t first,
                 int64_t last, const Scratch& scratch) {
  for (int64_t channel = first; channel < last; channel += geometry.width) {
    const int64_t at = geometry.offset(sample, unit_channel + channel);
    sum_block<T, kPlain, kColumns, kRelu, kResidual>(
        geometry, static_cast<const T*>(a.dy) + at, static_cast<const T*>(a.x) + at,
        static_cast<const T*>(kRelu && kResidual ? a.y : a.x) + at, scratch, channel);
  }
}

template <typename T, bool kPlain, int kColumns, bool kRelu, bool kResidual>
void gradient_segment(const Geometry& geometry, const Backward& a, int64_t sample, int64_t unit_channel,
                      int64_t first, int64_t last, const Scratch& scratch) {
  if (!a.dx && !a.dresidual) return;
  for (int64_t channel = first; channel < last; channel += geometry.width) {
    const int64_t at = geometry.offset(sample, unit_channel + channel);
    gradient_block<T, kPlain, kColumns, kRelu, kResidual>(
        geometry, static_cast<const T*>(a.dy) + at, static_cast<const T*>(a.x) + at,
        static_cast<const T*>(kRelu && kResidual ? a.y : a.x) + at, a.dx ? static_cast<T*>(a.dx) + at : nullptr,
        a.dresidual ? static_cast<T*>(a.dresidual) + at : nullptr, a.add_dx, a.add_dresidual, scratch, channel);
  }
}

// ------------------------------------------------------------------------------------------- threads

// Runs first(segment), between(), second(segment) for every unit: a unit per thread, or, where there are fewer units
// than threads (few samples and few groups), a segment per thread, in three steps.
template <typename First, typename Between, typename Second>
void for_each_unit(const Geometry& geometry, char* memory, int threads, const First& first, const Between& between,
                   const Second& second) {
  const int64_t segments = geometry.segments(), size = gn_gluon::kScratchBytes * geometry.unit_channels;
  const auto segment_of = [&](int64_t unit, int64_t segment, const auto& work, const Scratch& scratch) {
    const int64_t start = segment * geometry.segment_channels;
    work(unit / geometry.sample_units, unit % geometry.sample_units * geometry.unit_channels, start,
         least(start + geometry.segment_channels, geometry.unit_channels), scratch);
  };
  if (geometry.units >= threads || segments == 1) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t unit = 0; unit < geometry.units; ++unit) {
      const Scratch scratch(memory + omp_get_thread_num() * size, geometry.unit_channels);
      for (int64_t segment = 0; segment < segments; ++segment) segment_of(unit, segment, first, scratch);
      between(unit / geometry.sample_units, unit % geometry.sample_units * geometry.unit_channels, scratch);
      for (int64_t segment = 0; segment < segments; ++segment) segment_of(unit, segment, second, scratch);
    }
    return;
  }
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < geometry.units * segments; ++i)
      segment_of(i / segments, i % segments, first, Scratch(memory + i / segments * size, geometry.unit_channels));
#pragma omp for schedule(static)
    for (int64_t unit = 0; unit < geometry.units; ++unit)
      between(unit / geometry.sample_units, unit % geometry.sample_units * geometry.unit_channels,
              Scratch(memory + unit * size, geometry.unit_channels));
#pragma omp for schedule(static)
    for (int64_t i = 0; i < geometry.units * segments; ++i)
      segment_of(i / segments, i % segments, second, Scratch(memory + i / segments * size, geometry.unit_channels));
  }
}

template <typename T, bool kPlain, int kColumns, bool kRelu, bool kResidual>
void forward_in(const Shape& shape, const Forward& a, char* memory, int threads) {
  const Geometry geometry(shape, a.period, kColumns);
  for_each_unit(
      geometry, memory, threads,
      [&](int64_t sample, int64_t unit_channel, int64_t first, int64_t last, const Scratch& scratch) {
        segment_moments<T, kPlain, kColumns>(geometry, static_cast<const T*>(a.x), sample, unit_channel, first, last,
                                             scratch);
      },
      [&](int64_t sample, int64_t unit_channel, const Scratch& scratch) {
        finish_moments(shape, geometry, a, sample, unit_channel, scratch);
      },
      [&](int64_t sample, int64_t unit_channel, int64_t first, int64_t last, const Scratch& scratch) {
        normalize_segment<T, kPlain, kColumns, kRelu, kResidual>(geometry, a, sample, unit_channel, first, last,
                                                                 scratch);
      });
}

template <typename T, bool kPlain, int kColumns, bool kRelu, bool kResidual>
void backward_in(const Shape& shape, const Backward& a, char* memory, int threads) {
  const Geometry geometry(shape, a.period, kColumns);
  // A sample's parts of dgamma and dbeta; summed in the order of the samples, whatever thread made them.
  float* parts = reinterpret_cast<float*>(memory);
  for_each_unit(
      geometry, memory + sizeof(float) * 2 * shape.samples * shape.channels, threads,
      [&](int64_t sample, int64_t unit_channel, int64_t first, int64_t last, const Scratch& scratch) {
        load_statistics(shape, geometry, a, sample, unit_channel, first, last, scratch);
        sum_segment<T, kPlain, kColumns, kRelu, kResidual>(geometry, a, sample, unit_channel, first, last, scratch);
      },
      [&](int64_t sample, int64_t unit_channel, const Scratch& scratch) {
        finish_sums(shape, geometry, a, sample, unit_channel, scratch, parts + 2 * sample * shape.channels);
      },
      [&](int64_t sample, int64_t unit_channel, int64_t first, int64_t last, const Scratch& scratch) {
        gradient_segment<T, kPlain, kColumns, kRelu, kResidual>(geometry, a, sample, unit_channel, first, last,
                                                                scratch);
      });
  for (int64_t i = 0; i < 2 * shape.channels; ++i) {
    const bool is_gamma = i < shape.channels;
    float* out = is_gamma ? a.dgamma : a.dbeta;
    if (!out) continue;
    double sum = 0;
    for (int64_t sample = 0; sample < shape.samples; ++sample) sum += parts[2 * sample * shape.channels + i];
    out += is_gamma ? i : i - shape.channels;
    *out = static_cast<float>((is_gamma ? a.add_dgamma : a.add_dbeta) ? *out + sum : sum);
  }
}

// ------------------------------------------------------------------------------------------- choosing a template

template <typename T, bool kPlain, int kColumns>
void run(const Shape& shape, const Forward& a, char* memory, int threads) {
  if (a.relu)
    (a.residual ? forward_in<T, kPlain, kColumns, true, true>
                : forward_in<T, kPlain, kColumns, true, false>)(shape, a, memory, threads);
  else
    (a.residual ? forward_in<T, kPlain, kColumns, false, true>
                : forward_in<T, kPlain, kColumns, false, false>)(shape, a, memory, threads);
}

template <typename T, bool kPlain, int kColumns>
void run(const Shape& shape, const Backward& a, char* memory, int threads) {
  if (a.relu)
    (a.residual ? backward_in<T, kPlain, kColumns, true, true>
                : backward_in<T, kPlain, kColumns, true, false>)(shape, a, memory, threads);
  else
    (a.residual ? backward_in<T, kPlain, kColumns, false, true>
                : backward_in<T, kPlain, kColumns, false, false>)(shape, a, memory, threads);
}

template <typename T, typename Arguments>
void with_layout(const Shape& shape, const Arguments& a, char* memory, int threads) {
  if (a.period == 1) return run<T, true, 1>(shape, a, memory, threads);
  if (columns_of_block<T>(shape, a.period) == 1) return run<T, false, 1>(shape, a, memory, threads);
  run<T, false, 64 / (kLanes * sizeof(T))>(shape, a, memory, threads);
}

template <typename Arguments>
void with_type(const Shape& shape, const Arguments& a, char* memory, int threads) {
  switch (a.type) {
    case gn_gluon::Type::float32: return with_layout<float>(shape, a, memory, threads);
    case gn_gluon::Type::bfloat16: return with_layout<bfloat16>(shape, a, memory, threads);
    case gn_gluon::Type::float16: return run<float16, true, 1>(shape, a, memory, threads);
  }
}

}  // namespace

namespace gn_gluon {
namespace GN_GLUON_ISA {

extern const int kWidth = kLanes;

void forward(const Shape& shape, const Forward& arguments, char* scratch, int threads) {
  with_type(shape, arguments, scratch, threads);
}

void backward(const Shape& shape, const Backward& arguments, char* scratch, int threads) {
  with_type(shape, arguments, scratch, threads);
}

}  // namespace GN_GLUON_ISA
}  // namespace gn_gluon
