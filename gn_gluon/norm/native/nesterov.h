// The update of stochastic gradient descent with Nesterov momentum, of many arrays in one pass over memory:
//
//   g = rescale * gradient + decay * weight;  velocity = momentum * velocity - rate * g;
//   weight += momentum * velocity - rate * g
//
// MXNet's own operator goes over memory twice (in place it would decay by the new weight), one array at a time.
#pragma once
#include <cstdint>
#include <vector>

namespace gn_gluon {

struct UpdatedArray {
  float* weight;
  const float* gradient;
  float* velocity;
  int64_t size;
  float rate, decay;
};

void nesterov_update(const std::vector<UpdatedArray>& arrays, float momentum, float rescale);

}  // namespace gn_gluon
