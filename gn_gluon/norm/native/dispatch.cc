// Chooses the copy of the kernels that suits the processor, and gives it its scratch memory.
#include <omp.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "group_norm.h"

namespace gn_gluon {
namespace {

struct Kernels {
  const char* name;
  int width;
  void (*forward)(const Shape&, const Forward&, char*, int);
  void (*backward)(const Shape&, const Backward&, char*, int);
};

bool has_avx512() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#else
  return false;
#endif
}

bool has_avx2() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#else
  return false;
#endif
}

Kernels choose() {
  const char* wanted = std::getenv("GN_GLUON_ISA");
  const auto may_be = [wanted](const char* name) { return !wanted || !*wanted || !std::strcmp(wanted, name); };
#if defined(__x86_64__)
  if (has_avx512() && may_be("avx512")) return {"avx512", avx512::kWidth, avx512::forward, avx512::backward};
  if (has_avx2() && may_be("avx2")) return {"avx2", avx2::kWidth, avx2::forward, avx2::backward};
#endif
  return {"baseline", baseline::kWidth, baseline::forward, baseline::backward};
}

const Kernels& kernels() {
  static const Kernels chosen = choose();
  return chosen;
}

// Grows to the largest layer of the calling thread and is kept: fresh memory is slow on first touch.
char* scratch(const Shape& shape, int threads) {
  static thread_local std::unique_ptr<double[]> memory;
  static thread_local int64_t size = 0;
  const int64_t bytes = shape.channels * (kScratchBytes * threads + 8 * shape.samples);
  if (bytes > size) {
    memory.reset();
    memory.reset(new double[(bytes + 7) / 8]);
    size = bytes;
  }
  return reinterpret_cast<char*>(memory.get());
}

}  // namespace

const char* instruction_set() { return kernels().name; }

bool takes(Type type, int64_t period, int64_t channels) {
  if (period == 1) return true;
  return type != Type::float16 && channels % period == 0 && period % kernels().width == 0;
}

void forward(const Shape& shape, const Forward& arguments) {
  if (shape.samples == 0 || shape.pixels == 0) return;
  const int threads = omp_get_max_threads();
  kernels().forward(shape, arguments, scratch(shape, threads), threads);
}

void backward(const Shape& shape, const Backward& arguments) {
  const int threads = omp_get_max_threads();
  kernels().backward(shape, arguments, scratch(shape, threads), threads);
}

}  // namespace gn_gluon
