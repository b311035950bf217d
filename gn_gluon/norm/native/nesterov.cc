#include "nesterov.h"

#include <omp.h>

#include <algorithm>

namespace gn_gluon {

void nesterov_update(const std::vector<UpdatedArray>& arrays, float momentum, float rescale) {
  int64_t all = 0;
  for (const UpdatedArray& array : arrays) all += array.size;
#pragma omp parallel
  {
    // Each thread takes an equal part of all elements in a row: a layer may have 64 of them or two million.
    const int64_t begin = all * omp_get_thread_num() / omp_get_num_threads();
    const int64_t end = all * (omp_get_thread_num() + 1) / omp_get_num_threads();
    int64_t start = 0;
    for (const UpdatedArray& array : arrays) {
      const int64_t first = std::max<int64_t>(begin - start, 0), last = std::min(end - start, array.size);
      float* __restrict weight = array.weight;
      const float* __restrict gradient = array.gradient;
      float* __restrict velocity = array.velocity;
      for (int64_t i = first; i < last; ++i) {
        const float step = array.rate * (rescale * gradient[i] + array.decay * weight[i]);
        velocity[i] = momentum * velocity[i] - step;
        weight[i] += momentum * velocity[i] - step;
      }
      start += array.size;
    }
  }
}

}  // namespace gn_gluon
