// The kernels of gn_gluon/norm/native against the definition in double: every layout, type and fused form.
// test_kernels.py compiles it with and without sanitizers and runs it for every instruction set.
// Prints the largest error of each quantity, relative to the largest value of its array; exits with 1 beyond bounds.
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "group_norm.h"

using namespace gn_gluon;

namespace {

struct Case {
  Shape shape;
  Type type;
  int64_t period;
  bool relu, residual, add;
  float mean, deviation;

  std::string text() const {
    char buffer[200];
    std::snprintf(buffer, sizeof buffer, "N%ld C%ld L%ld G%ld type%d period%ld relu%d residual%d add%d mean%g",
                  shape.samples, shape.channels, shape.pixels, shape.groups, static_cast<int>(type), period, relu, residual,
                  add, mean);
    return buffer;
  }
};

float round_to(float value, Type type) {
  uint32_t bits;
  if (type == Type::float32) return value;
  if (type == Type::bfloat16) {
    std::memcpy(&bits, &value, 4);
    bits = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000u;
    std::memcpy(&value, &bits, 4);
    return value;
  }
  int exponent;
  std::frexp(value, &exponent);
  const double unit = std::ldexp(1., std::max(exponent, -13) - 11);  // a half has 11 bits
  const double rounded = std::nearbyint(value / unit) * unit;
  return std::fabs(rounded) > 65504 ? std::copysign(INFINITY, value) : rounded;
}

// An array in the layout and type of a case, with a guard after its end. Element i of plain NCHW is at(i).
struct Array {
  const Case& c;
  std::vector<char> bytes;

  explicit Array(const Case& of) : c(of) {
    bytes.resize(c.shape.samples * c.shape.channels * c.shape.pixels * width());
  }
  int width() const { return c.type == Type::float32 ? 4 : 2; }
  int64_t index(int64_t i) const {
    const Shape& s = c.shape;
    const int64_t pixel = i % s.pixels, channel = i / s.pixels % s.channels, sample = i / s.pixels / s.channels;
    return sample * s.channels * s.pixels + channel / c.period * s.pixels * c.period + pixel * c.period +
           channel % c.period;
  }
  void set(int64_t i, float value) {
    char* to = &bytes[index(i) * width()];
    if (c.type == Type::float32) {
      std::memcpy(to, &value, 4);
    } else if (c.type == Type::bfloat16) {
      std::memcpy(to, reinterpret_cast<char*>(&value) + 2, 2);
    } else {
      uint16_t half = std::signbit(value) ? 0x8000 : 0;
      const double magnitude = std::fabs(value);
      if (magnitude >= 0x1p-14) {
        int exponent;
        const double mantissa = std::frexp(magnitude, &exponent);
        half |= (exponent + 14) << 10 | static_cast<int>(mantissa * 2048 - 1024);
      } else {
        half |= static_cast<int>(magnitude * 0x1p24);
      }
      std::memcpy(to, &half, 2);
    }
  }
  double get(int64_t i) const {
    const char* from = &bytes[index(i) * width()];
    float value = 0;
    if (c.type == Type::float32) {
      std::memcpy(&value, from, 4);
    } else if (c.type == Type::bfloat16) {
      std::memcpy(reinterpret_cast<char*>(&value) + 2, from, 2);
    } else {
      uint16_t half;
      std::memcpy(&half, from, 2);
      const int exponent = half >> 10 & 31, mantissa = half & 1023;
      double magnitude = exponent == 31 ? (mantissa ? NAN : INFINITY)
                         : exponent     ? std::ldexp(1024 + mantissa, exponent - 25)
                                        : std::ldexp(mantissa, -24);
      return half & 0x8000 ? -magnitude : magnitude;
    }
    return value;
  }
};

struct Worst {
  double error = 0;
  std::string where;
};
Worst worst[3][5];  // by type: y, dx, dresidual, dgamma, dbeta
const char* const kNames[] = {"y", "dx", "dresidual", "dgamma", "dbeta"};

template <typename Get>
void compare(int what, const Case& c, const std::vector<double>& wanted, const Get& get) {
  double error = 0, largest = 1e-30;
  for (size_t i = 0; i < wanted.size(); ++i) {
    const double difference = std::fabs(get(i) - wanted[i]);
    error = difference <= error ? error : difference;  // NaN counts as an error
    largest = std::max(largest, std::fabs(wanted[i]));
  }
  Worst& w = worst[static_cast<int>(c.type)][what];
  if (!(error / largest <= w.error)) w = Worst{error / largest, c.text()};
}

void check(const Case& c, std::mt19937& random) {
  const Shape& s = c.shape;
  const int64_t n = s.samples * s.channels * s.pixels, groups = s.samples * s.groups, size = n / groups;
  std::normal_distribution<float> normal;
  Array x(c), residual(c), y(c), dy(c), dx(c), dresidual(c);
  std::vector<float> gamma(s.channels), beta(s.channels), dgamma(s.channels), dbeta(s.channels);
  std::vector<float> mean(2 * groups), rstd(2 * groups);
  for (int64_t i = 0; i < n; ++i) {
    x.set(i, round_to(c.mean + c.deviation * normal(random), c.type));
    residual.set(i, round_to(normal(random), c.type));
    dy.set(i, round_to(normal(random), c.type));
    dx.set(i, round_to(normal(random), c.type));
    dresidual.set(i, round_to(normal(random), c.type));
  }
  for (int64_t i = 0; i < s.channels; ++i) {
    gamma[i] = 1 + normal(random) / 4, beta[i] = normal(random), dgamma[i] = normal(random), dbeta[i] = normal(random);
  }
  const std::vector<float> old_dgamma = dgamma, old_dbeta = dbeta;
  const Array old_dx = dx, old_dresidual = dresidual;

  forward(s, Forward{c.type, c.period, c.relu, x.bytes.data(), c.residual ? residual.bytes.data() : nullptr,
                     gamma.data(), beta.data(), y.bytes.data(), mean.data(), rstd.data()});
  backward(s, Backward{c.type, c.period, c.relu, dy.bytes.data(), x.bytes.data(),
                       c.relu && c.residual ? y.bytes.data() : nullptr, c.residual, gamma.data(), beta.data(),
                       mean.data(), rstd.data(), dx.bytes.data(), c.residual ? dresidual.bytes.data() : nullptr,
                       dgamma.data(), dbeta.data(), c.add, c.add, c.add, c.add});

  std::vector<double> wanted_y(n), wanted_dx(n), wanted_dresidual(n), wanted_dgamma(s.channels),
      wanted_dbeta(s.channels), x_hat(n), slope(n);
  for (int64_t g = 0; g < groups; ++g) {
    double sum = 0, m2 = 0, average = 0, product = 0;
    for (int64_t i = g * size; i < (g + 1) * size; ++i) sum += x.get(i);
    for (int64_t i = g * size; i < (g + 1) * size; ++i) m2 += std::pow(x.get(i) - sum / size, 2);
    const double inverse = 1 / std::sqrt(m2 / size + s.epsilon);
    for (int64_t i = g * size; i < (g + 1) * size; ++i) {
      const int64_t channel = i / s.pixels % s.channels;
      x_hat[i] = (x.get(i) - sum / size) * inverse;
      double value = x_hat[i] * gamma[channel] + beta[channel] + (c.residual ? residual.get(i) : 0);
      slope[i] = c.relu && y.get(i) <= 0 ? 0 : dy.get(i);  // the sign of values around 0 is y's own
      wanted_y[i] = c.relu ? std::max(value, 0.) : value;
      wanted_dgamma[channel] += slope[i] * x_hat[i];
      wanted_dbeta[channel] += slope[i];
      average += slope[i] * gamma[channel] / size;
      product += slope[i] * gamma[channel] * x_hat[i] / size;
    }
    for (int64_t i = g * size; i < (g + 1) * size; ++i) {
      const int64_t channel = i / s.pixels % s.channels;
      wanted_dx[i] = inverse * (slope[i] * gamma[channel] - average - x_hat[i] * product) + c.add * old_dx.get(i);
      wanted_dresidual[i] = slope[i] + c.add * old_dresidual.get(i);
    }
  }
  for (int64_t i = 0; i < s.channels; ++i) {
    wanted_dgamma[i] += c.add * old_dgamma[i];
    wanted_dbeta[i] += c.add * old_dbeta[i];
  }
  compare(0, c, wanted_y, [&](int64_t i) { return y.get(i); });
  compare(1, c, wanted_dx, [&](int64_t i) { return dx.get(i); });
  if (c.residual) compare(2, c, wanted_dresidual, [&](int64_t i) { return dresidual.get(i); });
  compare(3, c, wanted_dgamma, [&](int64_t i) { return dgamma[i]; });
  compare(4, c, wanted_dbeta, [&](int64_t i) { return dbeta[i]; });

  // In place, and on another number of threads: the same bits.
  Array in_place = c.residual ? residual : x, gradient = dy;
  std::vector<float> mean_again(2 * groups), rstd_again(2 * groups), dgamma_again(s.channels);
  omp_set_num_threads(5);
  forward(s, Forward{c.type, c.period, c.relu, c.residual ? x.bytes.data() : in_place.bytes.data(),
                     c.residual ? in_place.bytes.data() : nullptr, gamma.data(), beta.data(), in_place.bytes.data(),
                     mean_again.data(), rstd_again.data()});
  if (!c.add)
    backward(s, Backward{c.type, c.period, c.relu, gradient.bytes.data(), x.bytes.data(),
                         c.relu && c.residual ? y.bytes.data() : nullptr, c.residual, gamma.data(), beta.data(),
                         mean.data(), rstd.data(), gradient.bytes.data(), nullptr, dgamma_again.data(), nullptr,
                         false, false, false, false});
  omp_set_num_threads(2);
  if (in_place.bytes != y.bytes || mean_again != mean || rstd_again != rstd ||
      (!c.add && (gradient.bytes != dx.bytes || dgamma_again != dgamma))) {
    std::printf("differs in place or on 5 threads: %s\n", c.text().c_str());
    std::exit(1);
  }
}

// NaN, infinity and values too small for a normal float32 in one group stay in it and are not lost there.
bool special_values() {
  const Shape s = {1, 32, 20, 2, 1e-5f};
  bool good = true;
  for (float special : {NAN, INFINITY}) {
    std::vector<float> x(640, 1.f), y(640), gamma(32, 1.f), beta(32, 0.f), mean(4), rstd(4);
    for (int i = 0; i < 640; ++i) x[i] = i % 7;
    x[3] = special;
    forward(s, Forward{Type::float32, 1, true, x.data(), nullptr, gamma.data(), beta.data(), y.data(), mean.data(),
                       rstd.data()});
    for (int i = 0; i < 640; ++i) good &= i < 320 ? std::isnan(y[i]) : std::isfinite(y[i]);
  }
  std::vector<float> x(640), y(640), gamma(32, 1.f), beta(32, 1e-41f), mean(4), rstd(4);
  for (int i = 0; i < 640; ++i) x[i] = 1e-40f;
  forward(s, Forward{Type::float32, 1, false, x.data(), nullptr, gamma.data(), beta.data(), y.data(), mean.data(),
                     rstd.data()});
  for (float value : y) good &= std::fabs(value - 1e-41f) < 1e-43f;
  return good;
}

// Each bfloat16 and float16 comes back as it was: x_hat is x when the statistics are 0 and 1.
bool conversions() {
  const int64_t count = 1 << 16;
  bool good = true;
  for (Type type : {Type::bfloat16, Type::float16}) {
    const Shape s = {1, 1, count, 1, 0.f};
    const Case c = {s, type, 1, false, true, false, 0, 1};
    Array zeros(c), all(c), y(c);
    for (int64_t i = 0; i < count; ++i) {
      const uint16_t bits = i;
      std::memcpy(&all.bytes[2 * i], &bits, 2);
      zeros.set(i, i % 2 ? 1 : -1);
    }
    std::vector<float> gamma(1, 0.f), beta(1, 0.f), mean(2), rstd(2);  // y = 0 * x_hat + 0 + residual
    forward(s, Forward{type, 1, false, zeros.bytes.data(), all.bytes.data(), gamma.data(), beta.data(),
                       y.bytes.data(), mean.data(), rstd.data()});
    for (int64_t i = 0; i < count; ++i)
      good &= std::isnan(all.get(i)) ? std::isnan(y.get(i)) : all.get(i) == y.get(i);
  }
  return good;
}

// Two samples whose elements number more than 2^31 would, by the same products, overflow 32-bit arithmetic.
bool large() {
  const int64_t channels = 2, pixels = (int64_t{1} << 29) + 5;  // 2^31 + 20 bytes of bfloat16
  const Shape s = {2, channels, pixels, 1, 1e-5f};
  std::vector<uint16_t> x(2 * channels * pixels);
  for (size_t i = 0; i < x.size(); ++i) x[i] = i % 2 ? 0x3f80 : 0xbf80;  // 1 and -1
  const std::vector<uint16_t> tail(x.end() - 8, x.end());
  std::vector<float> gamma(channels, 1.f), beta(channels, 0.f), mean(4), rstd(4), dgamma(channels);
  forward(s, Forward{Type::bfloat16, 1, false, x.data(), nullptr, gamma.data(), beta.data(), x.data(), mean.data(),
                     rstd.data()});
  return std::fabs(mean[1]) < 1e-6 && std::fabs(rstd[1] - 1) < 1e-4 &&
         std::equal(tail.begin(), tail.end(), x.end() - 8);
}

}  // namespace

int main(int count, char** arguments) {
  if (count > 1 && !std::strcmp(arguments[1], "large")) return large() ? 0 : 1;
  std::printf("%s\n", instruction_set());
  omp_set_num_threads(2);
  std::mt19937 random(1);
  const int64_t shapes[][4] = {{2, 24, 35, 8}, {1, 30, 13, 5},  {3, 24, 1, 24}, {2, 64, 49, 32},  {2, 64, 81, 64},
                               {1, 64, 49, 1}, {2, 128, 9, 16}, {1, 96, 25, 3}, {5, 32, 600, 32}, {1, 16, 1, 16},
                               {2, 64, 1, 8}, {1, 48, 5000, 3}};
  for (const auto& d : shapes)
    for (Type type : {Type::float32, Type::bfloat16, Type::float16})
      for (int64_t period : {int64_t{1}, int64_t{8}, int64_t{16}, d[1]}) {
        if (d[1] % period || !takes(type, period, d[1])) continue;
        for (int form = 0; form < 8; ++form)
          check(Case{{d[0], d[1], d[2], d[3], 1e-5f}, type, period, bool(form & 1), bool(form & 2), bool(form & 4),
                     form % 3 ? 0.f : 3.f, 1.f}, random);
      }
  // Ill-conditioned: a mean of 1e5 and a deviation of 0.1.
  for (int64_t period : {1, 16})
    check(Case{{2, 64, 196, 32, 1e-5f}, Type::float32, period, false, false, false, 1e5f, .1f}, random);
  check(Case{{2, 64, 196, 32, 1e-5f}, Type::float32, 1, false, false, false, 5.f, 0.f}, random);  // constant

  const double bounds[3][5] = {{2.5e-7, 4e-7, 1e-7, 6e-7, 5e-7}, {4e-3, 4e-3, 4e-3, 1e-6, 1e-6},
                               {5e-4, 5e-4, 5e-4, 1e-6, 1e-6}};
  bool good = true;
  for (int type = 0; type < 3; ++type)
    for (int what = 0; what < 5; ++what) {
      const Worst& w = worst[type][what];
      std::printf("type%d %-9s %.2g  %s\n", type, kNames[what], w.error, w.where.c_str());
      good &= w.error <= bounds[type][what];
    }
  const bool special = special_values(), converted = conversions();
  std::printf("special values %s, conversions %s\n", special ? "ok" : "WRONG", converted ? "ok" : "WRONG");
  return good && special && converted ? 0 : 1;
}
