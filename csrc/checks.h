// Argument checks of the bindings. Arrays arrive as untyped nb::ndarray<> with .noconvert(), so that nothing is ever
// copied behind the caller's back (an in-place result would go into the copy), and so that the message can name the
// argument, what came, and what is allowed.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>
#include <optional>
#include <string>

namespace mmrlhf {

namespace nb = nanobind;
using Array = nb::ndarray<>;

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
    throw nb::value_error((std::string(name) + " must be on " + wanted + ", got device type " +
                           std::to_string(array.device_type()) + " (DLPack), index " + std::to_string(array.device_id()))
                              .c_str());
  }
}

// [rows, cols] float32 whose columns are contiguous and whose rows do not overlap. Returns the row stride in elements.
inline int64_t check_tile(const char* name, const Array& array, int device_type) {
  check_kind(name, array, nb::dtype<float>(), device_type, array.device_id());
  if (array.ndim() != 2) {
    throw nb::value_error((std::string(name) + " must be [rows, cols], got shape " + shape_of(array)).c_str());
  }
  const int64_t rows = array.shape(0), cols = array.shape(1);
  if (rows == 0 || cols == 0) return cols;  // strides of an empty array mean nothing
  if (cols > 1 && array.stride(1) != 1) {
    throw nb::value_error((std::string(name) + " must have contiguous columns (stride 1), got column stride " +
                           std::to_string(array.stride(1)))
                              .c_str());
  }
  if (rows > 1 && array.stride(0) < cols) {
    throw nb::value_error((std::string(name) + " must have rows that do not overlap (row stride >= " +
                           std::to_string(cols) + "), got row stride " + std::to_string(array.stride(0)))
                              .c_str());
  }
  return rows > 1 ? array.stride(0) : cols;
}

// A contiguous [rows] vector of T beside the tile.
template <typename T>
T* check_rows(const char* name, const Array& array, int64_t rows, int device_type, int device_id) {
  check_kind(name, array, nb::dtype<T>(), device_type, device_id);
  if (array.ndim() != 1 || static_cast<int64_t>(array.shape(0)) != rows) {
    throw nb::value_error((std::string(name) + " must have shape [" + std::to_string(rows) +
                           "], one value a row of tile, got " + shape_of(array))
                              .c_str());
  }
  if (rows > 1 && array.stride(0) != 1) {
    throw nb::value_error(
        (std::string(name) + " must be contiguous, got stride " + std::to_string(array.stride(0))).c_str());
  }
  return static_cast<T*>(array.data());
}

// The arguments of exp2_rowsum, checked; the same on every device.
struct Exp2RowsumArguments {
  float* tile;
  int64_t rows, cols, stride;
  const float* offset;
  float* sums;
  const int64_t* target_col = nullptr;
  float* target_exp = nullptr;

  Exp2RowsumArguments(const Array& tile_, const Array& offset_, const Array& sums_, const std::optional<Array>& target_col_,
                      const std::optional<Array>& target_exp_, int device_type, const char* sums_name = "sums",
                      const char* target_name = "target_col") {
    stride = check_tile("tile", tile_, device_type);
    const int device = tile_.device_id();
    tile = static_cast<float*>(tile_.data());
    rows = static_cast<int64_t>(tile_.shape(0));
    cols = static_cast<int64_t>(tile_.shape(1));
    offset = check_rows<float>("offset", offset_, rows, device_type, device);
    sums = check_rows<float>(sums_name, sums_, rows, device_type, device);
    if (target_col_) target_col = check_rows<int64_t>(target_name, *target_col_, rows, device_type, device);
    if (target_exp_) {
      if (!target_col_) throw nb::value_error("target_exp needs target_col, which is None");
      target_exp = check_rows<float>("target_exp", *target_exp_, rows, device_type, device);
    }
  }
};

}  // namespace mmrlhf
