#pragma once

// What a mixer's description is made of. A mixer is described once, by its config struct (the headers beside this one):
//
// clang-format off
//   kName            its name in config.json, in messages and in Python (the class is named after the struct)
//   kLetter          a letter for patterns of layers, such as cLWcc
//   kAbout           one sentence: the docstring of the Python class
//   fields(visitor)  calls visitor(key, pointer to member, domain, meaning) for every field, in the order of config.json;
//                    a meaning that begins with "e, " gives the field the letter e in the shapes of the documents
//   projections(d)   the matrices that activations are multiplied by; d = hidden_size
//   parameters()     the other tensors of its weights; they are kept in float32
//   state()          what it keeps of a sequence
//   prefix_tokens()  only where it reads the first tokens of a sequence as a whole: how many
//   summary()        its shape in words, for `based inspect`
//   make(weights)    the layer with its weights, defined in cpp/model
// clang-format on
//
// Reading, checking, counting and writing of configs, the Python bindings, the loading of weights, state pools, state
// files and the tables of docs/ follow from it.

#include <algorithm>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

namespace based {

class Mixer;         // cpp/model/mixer.h
class MixerWeights;  // cpp/model/mixer.h

/// Upper limits, far beyond any model. They keep arithmetic on sizes from overflowing: the number of elements of a
/// matrix or of a layer's state is a product of at most four of them and fits int64, and so does the sum over 4,096
/// layers of float32 elements.
namespace limits {
inline constexpr std::int64_t kSize = 1 << 24;  // vocabulary, hidden and inner sizes, window
inline constexpr std::int64_t kLayers = 4096;
inline constexpr std::int64_t kHeads = 1 << 16;
inline constexpr std::int64_t kHeadDim = 1 << 16;
inline constexpr std::int64_t kFeatureDim = 4096;
inline constexpr std::int64_t kKernelSize = 1 << 16;
inline constexpr std::int64_t kPrefix = 1 << 16;                  // tokens that are read as a whole
inline constexpr std::int64_t kElements = std::int64_t{1} << 40;  // of one matrix, of one layer's state: exclusive
}  // namespace limits

/// The values that a field may have. A domain may depend on fields that were visited before.
namespace domain {
/// low … high. `limit`: what `high` is, in words of other fields, when it is no constant.
struct Integer {
  std::int64_t low, high;
  std::string_view limit = {};
};
/// The divisors of another field, which is called `limit`.
struct Divisor {
  std::int64_t of;
  std::string_view limit;
};
/// The model's hidden_size: of a mixer whose parameters or state are as wide as the residual stream.
struct HiddenSize {};
struct Positive {};     // a finite real > 0
struct NonNegative {};  // a finite real ≥ 0
struct Flag {};         // true or false
}  // namespace domain

/// y = x Wᵀ (+ b): W (rows, cols) is the tensor "{name}.weight", b (rows) is "{name}.bias".
struct Projection {
  std::string_view name;
  std::int64_t rows = 0, cols = 0;
  bool bias = false;
  bool stacked = false;  // on the projection before it, which has the same columns and bias: both are one product
};

/// A tensor of the weights that is no projection, by its whole name.
struct Parameter {
  std::string_view name;
  std::vector<std::int64_t> shape;
};

/// Of a state's numbers. In a state file `projection` is float32.
enum class StateDType : std::uint8_t {
  float32,
  model,       // the dtype that the model runs in
  projection,  // the dtype that the device computes projections in: float32 on the CPU, the model's on a GPU
};

enum class StateKind : std::uint8_t {
  dense,    // always whole
  ring,     // its rows (first axis) are those of the last tokens: a state file has min(num_tokens, rows) of them
  taylor,   // always whole in a state file; every device packs it in its own way
  pending,  // a row for each token that a device has not added to the sums of `taylor` yet: n ≥ 0 of them
  context,  // a row for each token
};

/// A tensor of a state file, called "layers.{i}.{name}".
struct StateTensor {
  std::string_view name;
  StateKind kind = StateKind::dense;
  StateDType dtype = StateDType::float32;
  std::vector<std::int64_t> shape;  // first extent of a ring: the rows of a full one; of pending and context: 0
};

/// An array that memory and state file hold alike.
struct DenseState {
  std::string_view name;
  std::vector<std::int64_t> shape;
  StateDType dtype = StateDType::float32;

  std::vector<StateTensor> tensors() const { return {{name, StateKind::dense, dtype, shape}}; }
};

/// Keys and values of the last `rows` tokens, each (rows, num_heads, head_dim).
struct RingState {
  std::int64_t rows = 0, num_heads = 0, head_dim = 0;

  /// Of each of the two tensors of a sequence that has seen num_tokens tokens.
  std::vector<std::int64_t> saved_shape(std::int64_t num_tokens) const {
    return {std::min(num_tokens, rows), num_heads, head_dim};
  }
  std::vector<StateTensor> tensors() const {
    return {{"keys", StateKind::ring, StateDType::model, {rows, num_heads, head_dim}},
            {"values", StateKind::ring, StateDType::model, {rows, num_heads, head_dim}}};
  }
};

/// Σ φ(k) [v | 1]ᵀ, (num_heads, num_features, head_dim + 1), over all tokens but the pending ones, whose keys and
/// values are kept as they are. φ is packed as docs/state-format.md says.
struct TaylorState {
  std::int64_t num_heads = 0, feature_dim = 0, head_dim = 0;

  std::int64_t num_features() const { return 1 + feature_dim + feature_dim * (feature_dim + 1) / 2; }
  std::vector<std::int64_t> saved_shape() const { return {num_heads, num_features(), head_dim + 1}; }
  std::vector<StateTensor> tensors() const {
    return {{"taylor", StateKind::taylor, StateDType::float32, saved_shape()},
            {"pending_keys", StateKind::pending, StateDType::model, {0, num_heads, feature_dim}},
            {"pending_values", StateKind::pending, StateDType::model, {0, num_heads, head_dim}}};
  }
};

/// Keys and values of all tokens, each (num_tokens, num_heads, head_dim).
struct ContextState {
  std::int64_t num_heads = 0, head_dim = 0;

  std::vector<std::int64_t> saved_shape(std::int64_t num_tokens) const { return {num_tokens, num_heads, head_dim}; }
  std::vector<StateTensor> tensors() const {
    return {{"keys", StateKind::context, StateDType::model, saved_shape(0)},
            {"values", StateKind::context, StateDType::model, saved_shape(0)}};
  }
};

/// What a device lays out, saves and restores as one: a function for each of them.
using StatePart = std::variant<DenseState, RingState, TaylorState, ContextState>;

}  // namespace based
