#pragma once

#include "based/tensor.h"

namespace based::io {

/// Writes src's elements as `dst` to out (src.size() · size_of(dst) bytes, any alignment, no overlap with src). Both
/// dtypes are of float32, bfloat16, float16, float64. Rounds once, to nearest even; keeps infinities, signed zeros and
/// subnormals; a NaN stays a NaN. Throws InvalidArgument for another dtype.
void convert(const TensorView& src, DType dst, void* out);

}  // namespace based::io
