// Group Normalization (Wu & He 2018) with ReLU and residual add fused, on CPUs: what the operators call.
//
//   y = relu((x - mean) * rstd * gamma + beta + residual)
//
// mean and rstd = 1 / sqrt(variance + epsilon) are those of a sample and of channels / groups consecutive channels.
// One layout covers all of oneDNN's that matter here, by its `period` P: element (sample, channel, pixel) lies at
//
//   sample * C * L + (channel / P) * L * P + pixel * P + channel % P        (C channels, L pixels)
//
// so P = 1 is plain NCHW, P = 8 and 16 are nChw8c and nChw16c, P = C is nhwc. P divides C.
#pragma once
#include <cstdint>

namespace gn_gluon {

enum class Type { float32, bfloat16, float16 };

struct Shape {
  int64_t samples, channels, pixels, groups;
  float epsilon;
};

// mean and rstd have 2 * samples * groups elements: what float32 holds of the value, and after all of these what it
// left out. The backward pass needs the sum, to recompute the sign of y and to centre x around 1e5.
struct Forward {
  Type type;                // of x, residual and y
  int64_t period;
  bool relu;
  const void* x;
  const void* residual;     // or null
  const float* gamma;       // (channels)
  const float* beta;
  void* y;                  // may be x or residual itself
  float* mean;
  float* rstd;
};

struct Backward {
  Type type;                // of x, y, dy, dx, dresidual
  int64_t period;
  bool relu;
  const void* dy;
  const void* x;
  const void* y;            // read only with both relu and residual, where it gives the sign; else may be null
  bool residual;            // whether there was one
  const float* gamma;
  const float* beta;
  const float* mean;        // as forward wrote them
  const float* rstd;
  void* dx;                 // each of the following may be null, and dx may be dy itself
  void* dresidual;
  float* dgamma;            // (channels)
  float* dbeta;
  bool add_dx, add_dresidual, add_dgamma, add_dbeta;  // add to what is there instead of overwriting
};

// Both use all OpenMP threads; their results do not depend on the number of threads.
void forward(const Shape& shape, const Forward& arguments);
void backward(const Shape& shape, const Backward& arguments);

// Whether the kernels take a layout as it is; others must be brought to period 1 first.
bool takes(Type type, int64_t period, int64_t channels);

// The instruction set in use: "avx512", "avx2" or "baseline". The first that this processor has, unless
// GN_GLUON_ISA names another that it has too (for tests and comparisons).
const char* instruction_set();

// What a kernel needs: this per thread and channel, and 8 bytes per sample and channel.
constexpr int64_t kScratchBytes = 56;

// One copy of the kernels for each instruction set: kernels.cc is compiled once for each.
#define GN_GLUON_DECLARE(isa)                                                                  \
  namespace isa {                                                                              \
  extern const int kWidth;  /* float32 values of a register */                                 \
  void forward(const Shape& shape, const Forward& arguments, char* scratch, int threads);      \
  void backward(const Shape& shape, const Backward& arguments, char* scratch, int threads);    \
  }
GN_GLUON_DECLARE(avx512)
GN_GLUON_DECLARE(avx2)
GN_GLUON_DECLARE(baseline)
#undef GN_GLUON_DECLARE

}  // namespace gn_gluon
