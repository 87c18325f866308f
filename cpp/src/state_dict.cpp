// state_dict() and from_state_dict() of every noun, side by side.

#include "stableedit/state_dict.hpp"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "checks.hpp"
#include "stableedit/normalizer.hpp"
#include "stableedit/null_space.hpp"
#include "stableedit/past_keys.hpp"
#include "stableedit/step.hpp"
#include "state_fields.hpp"

namespace stableedit {
namespace {

// Counts enter the mathematics as float64, which has them exact up to here.
constexpr int64_t kMaxCount = 9'007'199'254'740'992;  // 2^53

// Sizes of parts that make up `total` rows.
std::vector<int64_t> read_pieces(const at::Tensor& stored, int64_t total) {
  const at::Tensor pieces = stored.to(at::kCPU);
  std::vector<int64_t> sizes;
  int64_t rest = total;
  for (int64_t i = 0; i < pieces.size(0); ++i) {
    const auto size = pieces[i].item<double>();
    // Compared as numbers: the cast of one that does not fit is undefined.
    const bool fits = size >= 1.0 && size <= static_cast<double>(rest) && size == std::floor(size);
    TORCH_CHECK_VALUE(
        fits, "'pieces' in the state of a PastKeys must be whole numbers from 1 with the sum ",
        total, ", but one of them is ", size);
    sizes.push_back(static_cast<int64_t>(size));
    rest -= sizes.back();
  }
  TORCH_CHECK_VALUE(rest == 0, "'pieces' in the state of a PastKeys must have the sum ", total,
                    ", but it is ", total - rest);
  return sizes;
}

}  // namespace

StateDict RunningMoments::state_dict() const {
  return {{"count", integer_field(count_)},
          {"mean", mean_},
          {"m2", m2_},
          {"unbiased_batches", integer_field(unbiased_batches_ ? 1 : 0)}};
}

RunningMoments RunningMoments::from_state_dict(const StateDict& state) {
  StateReader reader(state, "RunningMoments");
  const at::Tensor mean = reader.statistic("mean", 1);
  RunningMoments moments(mean.size(0), reader.integer("unbiased_batches", 0, 1) == 1);
  moments.count_ = reader.integer("count", 0, kMaxCount);
  moments.mean_ = mean;
  moments.m2_ = reader.statistic("m2", 1);
  TORCH_CHECK_VALUE(moments.m2_.sizes() == mean.sizes(),
                    "'mean' and 'm2' in the state of a RunningMoments must have one shape, but "
                    "they have ",
                    mean.sizes(), " and ", moments.m2_.sizes());
  reader.finish();
  return moments;
}

StateDict NormalInverseWishart::state_dict() const {
  return {{"count", integer_field(count_)},
          {"mean", mean_},
          {"scatter", scatter_},
          {"prior.kappa", number_field(prior_.kappa)},
          {"prior.psi", number_field(prior_.psi)},
          {"prior.nu", number_field(prior_.nu)}};
}

NormalInverseWishart NormalInverseWishart::from_state_dict(const StateDict& state) {
  StateReader reader(state, "NormalInverseWishart");
  const at::Tensor mean = reader.statistic("mean", 1);
  const NiwPrior prior{.kappa = reader.number("prior.kappa"),
                       .psi = reader.number("prior.psi"),
                       .nu = reader.number("prior.nu")};
  const at::Tensor scatter = reader.statistic("scatter", 2);
  const int64_t dim = mean.size(0);
  TORCH_CHECK_VALUE(scatter.size(0) == dim && scatter.size(1) == dim,
                    "'scatter' in the state of a NormalInverseWishart must have shape [", dim, ", ",
                    dim, "], but it has ", scatter.sizes());
  NormalInverseWishart tracker(dim, prior);
  tracker.count_ = reader.integer("count", 0, kMaxCount);
  tracker.mean_ = mean;
  tracker.scatter_ = scatter;
  reader.finish();
  return tracker;
}

StateDict Whitener::state_dict() const {
  StateDict state{{"mode", integer_field(static_cast<int64_t>(mode_))},
                  {"dim", integer_field(dim_)},
                  {"base", number_field(base_)},
                  {"floor", number_field(floor_)},
                  {"floored", integer_field(floored_)},
                  {"mean_square", number_field(mean_square_)}};
  if (stddev_.defined()) state["stddev"] = stddev_;
  if (root_.defined()) state["root"] = root_;
  if (vectors_.defined()) state["vectors"] = vectors_;
  if (scales_.defined()) state["scales"] = scales_;
  return state;
}

Whitener Whitener::from_state_dict(const StateDict& state) {
  StateReader reader(state, "Whitener");
  Whitener whitener(static_cast<WhiteningMode>(reader.integer("mode", 0, 2)));
  const int64_t dim = whitener.dim_ = reader.integer("dim", 0);
  whitener.base_ = reader.number("base");
  whitener.floor_ = reader.number("floor");
  whitener.floored_ = reader.integer("floored", 0, dim);
  if (reader.has("mean_square")) {  // version 1 has none
    whitener.mean_square_ = reader.number("mean_square");
    TORCH_CHECK_VALUE(whitener.mean_square_ >= 0.0 && whitener.mean_square_ <= 1.0,
                      "'mean_square' in the state of a Whitener must be from 0 to 1, but it is ",
                      whitener.mean_square_);
  }
  bool fits = true;
  if (whitener.mode_ == WhiteningMode::kDiagonal) {
    whitener.stddev_ = reader.tensor("stddev", 1);
  } else if (whitener.mode_ == WhiteningMode::kFull && reader.has("root")) {
    whitener.root_ = reader.tensor("root", 2);
    fits = whitener.root_.size(0) == dim && whitener.root_.size(1) == dim;
  } else if (whitener.mode_ == WhiteningMode::kFull) {
    whitener.vectors_ = reader.tensor("vectors", 2);
    whitener.scales_ = reader.tensor("scales", 1);
    fits = whitener.vectors_.size(0) == dim &&
           whitener.vectors_.size(1) == dim - whitener.floored_ &&
           whitener.scales_.size(0) == dim - whitener.floored_;
  }
  TORCH_CHECK_VALUE(fits, "the tensors in the state of a Whitener do not fit its dim = ", dim,
                    " and floored = ", whitener.floored_);
  reader.finish();
  return whitener;
}

StateDict LifelongNormalizer::state_dict() const {
  const WhiteningOptions& whitening = options_.whitening;
  StateDict state{
      {"whitening.mode", integer_field(static_cast<int64_t>(whitening.mode))},
      {"whitening.floor", number_field(whitening.floor)},
      {"whitening.floor_mode", integer_field(static_cast<int64_t>(whitening.floor_mode))},
      {"whitening.refresh", number_field(whitening.refresh)},
      {"whitening.drift_limit", number_field(whitening.drift_limit)},
      {"decompositions", integer_field(decompositions_)}};
  // Only where it is not as it always was: sessions know their states by digests of all fields.
  if (!whitening.centred) state["whitening.centred"] = integer_field(0);
  add_part(state, "keys.", key_moments_.state_dict());
  add_part(state, "values.", value_moments_.state_dict());
  if (value_tracker_) add_part(state, "tracker.", value_tracker_->state_dict());
  if (whitener_) {
    add_part(state, "whitener.", whitener_->state_dict());
    state["whitener_bits"] = integer_field(whitener_dtype_ == at::kDouble ? 64 : 32);
    state["whitener_nu"] = number_field(whitener_nu_);
  }
  return state;
}

LifelongNormalizer LifelongNormalizer::from_state_dict(const StateDict& state) {
  StateReader reader(state, "LifelongNormalizer");
  const RunningMoments keys = RunningMoments::from_state_dict(reader.part("keys."));
  const RunningMoments values = RunningMoments::from_state_dict(reader.part("values."));
  NormalizerOptions options;
  options.whitening = {
      .mode = static_cast<WhiteningMode>(reader.integer("whitening.mode", 0, 2)),
      .floor = reader.number("whitening.floor"),
      .floor_mode = static_cast<FloorMode>(reader.integer("whitening.floor_mode", 0, 1)),
      .refresh = reader.number("whitening.refresh"),
      .drift_limit = reader.number("whitening.drift_limit"),
      .centred = !reader.has("whitening.centred")};
  if (!options.whitening.centred) reader.integer("whitening.centred", 0, 0);
  options.unbiased_batches = keys.unbiased_batches();
  std::optional<NormalInverseWishart> tracker;
  if (options.whitening.mode == WhiteningMode::kFull) {
    tracker = NormalInverseWishart::from_state_dict(reader.part("tracker."));
    options.prior = tracker->prior();
  }
  LifelongNormalizer normalizer(keys.dim(), values.dim(), options);
  normalizer.decompositions_ = reader.integer("decompositions", 0);
  bool fits = values.unbiased_batches() == keys.unbiased_batches() &&
              (!tracker || tracker->dim() == values.dim());
  std::optional<Whitener> whitener;
  if (tracker && reader.has("whitener_nu")) {
    whitener = Whitener::from_state_dict(reader.part("whitener."));
    fits = fits && whitener->mode() == WhiteningMode::kFull && whitener->dim() == values.dim();
    const bool is_double = reader.integer("whitener_bits", 32, 64) == 64;
    normalizer.whitener_dtype_ = is_double ? at::kDouble : at::kFloat;
    normalizer.whitener_nu_ = reader.number("whitener_nu");
  }
  // Version 1 looked at some rows of a turn only, so its whitener may not know the last turn: with
  // the mean square of 0 that it is read with, the next turn renews it.
  if (tracker && reader.has("whitener_energy")) reader.number("whitener_energy");
  if (tracker && reader.has("sample")) reader.tensor("sample", 2);
  TORCH_CHECK_VALUE(fits,
                    "the parts in the state of a LifelongNormalizer do not fit each other: keys "
                    "of dimension ",
                    keys.dim(), ", value gradients of dimension ", values.dim());
  reader.finish();
  normalizer.key_moments_ = keys;
  normalizer.value_moments_ = values;
  normalizer.value_tracker_ = std::move(tracker);
  if (whitener) normalizer.keep(*std::move(whitener));
  return normalizer;
}

StateDict NullSpace::state_dict() const {
  return {{"basis", basis_},
          {"complement", integer_field(complement_ ? 1 : 0)},
          {"threshold", number_field(threshold_)}};
}

NullSpace NullSpace::from_state_dict(const StateDict& state) {
  StateReader reader(state, "NullSpace");
  NullSpace space(reader.tensor("basis", 2), reader.integer("complement", 0, 1) == 1,
                  reader.number("threshold"));
  reader.finish();
  const at::Tensor& basis = space.basis_;
  TORCH_CHECK_VALUE(space.threshold_ > 0.0,
                    "'threshold' in the state of a NullSpace must be positive, but it is ",
                    space.threshold_);
  TORCH_CHECK_VALUE(2 * basis.size(1) <= basis.size(0) && space.rank() > 0,
                    "'basis' in the state of a NullSpace must have at most half as many columns as "
                    "rows, and span "
                    "the complement where it has none, but its shape is ",
                    basis.sizes());
  // All inner products would cost as much as an update; what is damaged shows in the lengths.
  const at::Tensor squares = basis.square().sum(0);
  TORCH_CHECK_VALUE((squares - 1.0).abs().lt(1e-3).all().item<bool>(),
                    "'basis' in the state of a NullSpace must have orthonormal columns");
  return space;
}

// What `solve` derives from these is not written: it is a function of them, bit for bit.
StateDict PastKeys::state_dict() const {
  at::Tensor pieces = at::empty({static_cast<int64_t>(pieces_.size())}, at::kDouble);
  for (size_t i = 0; i < pieces_.size(); ++i) {
    pieces[static_cast<int64_t>(i)].fill_(static_cast<double>(pieces_[i]));
  }
  StateDict state{{"dim", integer_field(dim_)},
                  {"rank", integer_field(rank_)},
                  {"count", integer_field(count_)},
                  {"shrinkage", number_field(shrinkage_)},
                  {"pieces", pieces}};
  if (has_moment()) state["moment"] = moment();
  if (rows_.defined()) state["rows"] = rows_;
  return state;
}

PastKeys PastKeys::from_state_dict(const StateDict& state) {
  StateReader reader(state, "PastKeys");
  const int64_t dim = reader.integer("dim", 1);
  PastKeys past(dim, reader.integer("rank", 0));
  past.count_ = reader.integer("count", 0, kMaxCount);
  past.shrinkage_ = reader.number("shrinkage");
  TORCH_CHECK_VALUE(past.shrinkage_ >= 0.0,
                    "'shrinkage' in the state of a PastKeys must be at least 0, but it is ",
                    past.shrinkage_);
  const at::Tensor pieces = reader.statistic("pieces", 1);
  bool fits = reader.has("rows") == (past.count_ > 0);
  if (past.count_ > 0 && fits) {
    past.rows_ = reader.tensor("rows", 2);
    fits = past.rows_.size(1) == dim;
    if (past.rank_ == 0 && reader.has("moment")) {
      past.moment_ = reader.tensor("moment", 2);
      fits = fits && past.moment_.size(0) == dim && past.moment_.size(1) == dim &&
             past.moment_.scalar_type() == past.rows_.scalar_type();
      // Without a seed, the blocks of the diagonal are whole, in the states of all versions.
      past.packed_ = fits && !past.moment_.tril(-1).any().item<bool>();
    }
  }
  TORCH_CHECK_VALUE(fits, "the tensors in the state of a PastKeys do not fit its dim = ", dim,
                    ", count = ", past.count_, " and each other");
  past.pieces_ = read_pieces(pieces, past.count_ > 0 ? past.rows_.size(0) : 0);
  reader.finish();
  return past;
}

StateDict PolyakStep::state_dict() const {
  at::Tensor recent = at::empty({static_cast<int64_t>(recent_.size())}, at::kDouble);
  std::ranges::copy(recent_, recent.data_ptr<double>());
  return {{"share", number_field(options_.share)},
          {"growth", number_field(options_.growth)},
          {"window", integer_field(options_.window)},
          {"recent", recent}};
}

PolyakStep PolyakStep::from_state_dict(const StateDict& state) {
  StateReader reader(state, "PolyakStep");
  const double share = reader.number("share");
  const double growth = reader.number("growth");
  PolyakStep step(StepOptions{share, growth, reader.integer("window", 1)});
  const at::Tensor recent = reader.statistic("recent", 1).cpu();
  TORCH_CHECK_VALUE(recent.size(0) <= step.options_.window && recent.gt(0).all().item<bool>(),
                    "'recent' in the state of a PolyakStep must be at most ", step.options_.window,
                    " positive steps");
  const double* values = recent.const_data_ptr<double>();
  step.recent_.assign(values, values + recent.size(0));
  reader.finish();
  return step;
}

}  // namespace stableedit
