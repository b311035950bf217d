// The doors into libmxnet.so 1.9.1 that its public interface does not have, and why each of them holds.
//
// Everything here is bound to one binary: operator.py loads this library only beside a libmxnet.so of known SHA-256,
// after a self-test in another process. The wheel was compiled with GCC 4.8 and exports all its C++ symbols; we compile
// with the compiler at hand and the old string ABI (-D_GLIBCXX_USE_CXX11_ABI=0), and its own headers and -D flags.
#pragma once
#include <algorithm>
#include <atomic>
#include <functional>
#include <iostream>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <sstream>
#include <string>
#include <thread>
#include <typeinfo>
#include <unordered_map>
#include <vector>

// 1. NDArray's chunk, which knows oneDNN's layout, and Op's registry index are private. `private` changes no layout
//    under GCC, and no mangled name. The standard headers come first, untouched.
#define private public
#define protected public
#include <mxnet/ndarray.h>
#include <nnvm/op.h>
#undef private
#undef protected
#include <mxnet/op_attr_types.h>
#include <nnvm/op_attr_types.h>

namespace mxnet {
// 2. Two classes of src/operator/nn/mkldnn/mkldnn_base-inl.h, which the wheel does not ship: declared with the same
//    members. oneDNN's own functions (dnnl_*) are not exported, so descriptors are read, never made.
class MKLDNNMemory {
 public:
  std::shared_ptr<mkldnn::memory> mem;
  mkldnn::memory::desc desc;
  size_t size;
};
class MKLDNNStream {
 public:
  static MKLDNNStream* Get();
  void Submit(bool cleanup = true);
};
}  // namespace mxnet

namespace gn_gluon {

// The layout of an array's memory, or null where it is MXNet's own.
inline const dnnl_memory_desc_t* descriptor(const mxnet::NDArray& array) {
  return array.IsMKLDNNData() ? &array.ptr_->mkl_mem_->desc.data : nullptr;
}

// The first byte of an array in either kind of layout (NDArray::data() refuses oneDNN's).
inline void* first_byte(const mxnet::NDArray& array) {
  array.CheckAndAlloc();
  return static_cast<char*>(array.ptr_->shandle.dptr) + array.byte_offset_;
}

// 3. The std::function that an old library calls gets its arguments by value, the one that a new compiler makes expects
//    references to them. Where all arguments are references already (FComputeEx, FNumVisibleOutputs, FInplaceOption),
//    both are the same; Op::UpdateAttrMap's takes a pointer, so its invoker, the fourth word of a std::function in
//    every libstdc++, is replaced by one that takes it as the old library passes it.
namespace detail {
inline std::function<void(dmlc::any*)>*& pending_update() {
  static std::function<void(dmlc::any*)>* pointer = nullptr;
  return pointer;
}
inline void old_invoker(const void*, dmlc::any* map) { (*pending_update())(map); }
}  // namespace detail

// Op::set_attr for an operator that is registered already. `level` outranks what registered it.
template <typename Value>
void set_attribute(const std::string& op_name, const std::string& name, const Value& value, int level = 20) {
  const nnvm::Op* op = nnvm::Op::Get(op_name);
  std::function<void(dmlc::any*)> update = [&](dmlc::any* map) {
    if (map->empty()) {
      nnvm::OpMap<Value> fresh;
      fresh.attr_name_ = name;
      *map = std::move(fresh);
    }
    CHECK(map->type() == typeid(nnvm::OpMap<Value>)) << name << " has another type in this libmxnet.so";
    auto& values = nnvm::get<nnvm::OpMap<Value>>(*map).data_;
    if (values.size() <= op->index_) values.resize(op->index_ + 1, std::make_pair(Value(), 0));
    values[op->index_] = std::make_pair(value, level);
  };
  detail::pending_update() = &update;
  std::function<void(dmlc::any*)> handed_over = [](dmlc::any*) {};
  static_assert(sizeof handed_over == 4 * sizeof(void*), "libstdc++'s std::function");
  reinterpret_cast<void**>(&handed_over)[3] = reinterpret_cast<void*>(&detail::old_invoker);
  nnvm::Op::UpdateAttrMap(name, handed_over);
}

// 4. Of NodeAttrs only `dict` lies where both compilers see it (sizeof(std::unordered_map) is 48 there and 56 here, and
//    bucket lookup differs): it is walked, never searched.
inline std::string attribute(const nnvm::NodeAttrs& attributes, const char* name, const char* otherwise) {
  for (const auto& item : attributes.dict)
    if (item.first == name) return item.second;
  return otherwise;
}

}  // namespace gn_gluon
