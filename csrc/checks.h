// Argument checks of the bindings. Arrays arrive as untyped nb::ndarray<> with .noconvert(), so that nothing is ever
// copied behind the caller's back (an in-place result would go into the copy), and so that the message can name the
// argument, what came, and what is allowed.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>

namespace mmrlhf {

namespace nb = nanobind;
using Array = nb::ndarray<>;

#if defined(MMRLHF_EMULATE)  // tests/csrc: the kernels compiled as host code
constexpr int kCuda = nb::device::cpu::value;
#else
constexpr int kCuda = nb::device::cuda::value;
#endif

constexpr nb::dlpack::dtype kBfloat16{static_cast<uint8_t>(nb::dlpack::dtype_code::Bfloat), 16, 1};

inline nb::builtin_exception value_error(const std::string& text) { return nb::value_error(text.c_str()); }

inline void check_least(const char* name, int64_t value, int64_t least) {
  if (value >= least) return;
  throw value_error(std::string(name) + " must be at least " + std::to_string(least) + ", got " + std::to_string(value));
}

inline std::string name_of(nb::dlpack::dtype dtype) {
  const char* kind = "type";
  if (dtype.code == static_cast<uint8_t>(nb::dlpack::dtype_code::Float)) kind = "float";
  if (dtype.code == static_cast<uint8_t>(nb::dlpack::dtype_code::Int)) kind = "int";
  if (dtype.code == static_cast<uint8_t>(nb::dlpack::dtype_code::UInt)) kind = "uint";
  if (dtype.code == static_cast<uint8_t>(nb::dlpack::dtype_code::Bfloat)) kind = "bfloat";
  if (dtype.code == static_cast<uint8_t>(nb::dlpack::dtype_code::Bool)) kind = "bool";
  return kind + std::to_string(dtype.bits);
}

inline std::string shape_of(const Array& array) {
  std::string text = "[";
  for (size_t i = 0; i < array.ndim(); ++i) text += (i ? ", " : "") + std::to_string(array.shape(i));
  return text + "]";
}

inline void check_kind(const char* name, const Array& array, nb::dlpack::dtype dtype, int device_type, int device_id) {
  if (array.dtype() != dtype) {
    throw nb::type_error((std::string(name) + " must be " + name_of(dtype) + ", got " + name_of(array.dtype())).c_str());
  }
  if (array.device_type() != device_type || (device_type != nb::device::cpu::value && array.device_id() != device_id)) {
    const std::string wanted = device_type == nb::device::cpu::value ? "the CPU" : "CUDA device " + std::to_string(device_id);
    throw value_error(std::string(name) + " must be on " + wanted + ", got device type " +
                      std::to_string(array.device_type()) + " (DLPack), index " + std::to_string(array.device_id()));
  }
}

inline std::string shape_of(std::initializer_list<int64_t> shape) {
  std::string text = "[";
  for (const int64_t size : shape) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  return text + "]";
}

// [rows, cols] in one of the dtypes, its columns side by side, its rows apart.
struct Matrix {
  enum Dtype { float32, bfloat16, either };

  void* data;
  int64_t rows, cols;
  int64_t stride;  // elements from one row to the next; `cols` where there are not two
  bool half;       // bfloat16 and not float32

  Matrix(const char* name, const Array& array, Dtype dtype, int device_type, int device)
      : data(array.data()), half(dtype == bfloat16 || (dtype == either && array.dtype() == kBfloat16)) {
    if (dtype == either && !half && array.dtype() != nb::dtype<float>()) {
      throw nb::type_error((std::string(name) + " must be float32 or bfloat16, got " + name_of(array.dtype())).c_str());
    }
    check_kind(name, array, half ? kBfloat16 : nb::dtype<float>(), device_type, device);
    if (array.ndim() != 2) throw value_error(std::string(name) + " must be [rows, cols], got shape " + shape_of(array));
    rows = static_cast<int64_t>(array.shape(0));
    cols = static_cast<int64_t>(array.shape(1));
    stride = cols;
    if (rows == 0 || cols == 0) return;  // strides of an empty array mean nothing
    if (cols > 1 && array.stride(1) != 1) {
      throw value_error(std::string(name) + " must have contiguous columns (stride 1), got column stride " +
                        std::to_string(array.stride(1)));
    }
    if (rows > 1) stride = array.stride(0);
    if (stride < cols) {
      throw value_error(std::string(name) + " must have rows that do not overlap (row stride >= " +
                        std::to_string(cols) + "), got row stride " + std::to_string(stride));
    }
  }

  float* floats() const { return static_cast<float*>(data); }

  void want(const char* name, int64_t rows_, int64_t cols_) const {
    if (rows == rows_ && cols == cols_) return;
    throw value_error(std::string(name) + " must have shape " + shape_of({rows_, cols_}) + ", got " +
                      shape_of({rows, cols}));
  }
};

// A contiguous array of T whose shape is `shape`; `why`, if it is there, follows the shape in the error.
template <typename T>
T* check_array(const char* name, const Array& array, std::initializer_list<int64_t> shape, int device_type, int device,
               const char* why = "") {
  check_kind(name, array, nb::dtype<T>(), device_type, device);
  bool fits = array.ndim() == shape.size();
  size_t i = 0;
  for (const int64_t size : shape) fits = fits && static_cast<int64_t>(array.shape(i++)) == size;
  if (!fits) {
    throw value_error(std::string(name) + " must have shape " + shape_of(shape) + why + ", got " + shape_of(array));
  }
  int64_t stride = 1;
  for (size_t d = array.ndim(); d-- > 0; stride *= static_cast<int64_t>(array.shape(d))) {
    if (array.size() > 0 && array.shape(d) > 1 && array.stride(d) != stride) {
      throw value_error(std::string(name) + " must be contiguous, got stride " + std::to_string(array.stride(d)) +
                        " in dimension " + std::to_string(d));
    }
  }
  return static_cast<T*>(array.data());
}

template <typename T>
T* check_optional(const char* name, const std::optional<Array>& array, std::initializer_list<int64_t> shape,
                  int device_type, int device, const char* why = "") {
  return array ? check_array<T>(name, *array, shape, device_type, device, why) : nullptr;
}

// The arguments of exp2_rowsum and exp2_rowsum_block, checked; the same on every device. Messages use the caller's names.
struct Exp2RowsumArguments {
  float* tile;
  int64_t rows, cols, stride;
  const float* offset;
  float* sums;
  const int64_t* target_col = nullptr;
  float* target_exp = nullptr;

  static constexpr const char* kARow = ", one value a row of tile";

  Exp2RowsumArguments(const Array& tile_, const Array& offset_, const Array& sums_, const std::optional<Array>& target_col_,
                      const std::optional<Array>& target_exp_, int device_type, const char* sums_name = "sums",
                      const char* target_name = "target_col") {
    const int device = tile_.device_id();
    const Matrix matrix("tile", tile_, Matrix::float32, device_type, device);
    tile = matrix.floats(), rows = matrix.rows, cols = matrix.cols, stride = matrix.stride;
    offset = check_array<float>("offset", offset_, {rows}, device_type, device, kARow);
    sums = check_array<float>(sums_name, sums_, {rows}, device_type, device, kARow);
    target_col = check_optional<int64_t>(target_name, target_col_, {rows}, device_type, device, kARow);
    if (target_exp_ && !target_col_) throw nb::value_error("target_exp needs target_col, which is None");
    target_exp = check_optional<float>("target_exp", target_exp_, {rows}, device_type, device, kARow);
  }
};

}  // namespace mmrlhf
