#include "stableedit/contribution.hpp"

#include <ATen/ops/linalg_solve_ex.h>
#include <ATen/ops/mm.h>

#include <cmath>

#include "checks.hpp"

namespace stableedit {
namespace {

// With M = right keys^T + diagonal I; right and keys are float64.
LowRankUpdate share(const LowRankUpdate& update, const at::Tensor& owned, const at::Tensor& right,
                    const at::Tensor& keys, double diagonal) {
  TORCH_CHECK_VALUE(owned.defined(), "owned is not a tensor; expected a bool vector [",
                    update.rank(), "]");
  TORCH_CHECK_VALUE(owned.dim() == 1 && owned.size(0) == update.rank(),
                    "owned must have one entry per answer token of the update, [", update.rank(),
                    "], but its shape is ", owned.sizes());
  TORCH_CHECK_TYPE(owned.scalar_type() == at::kBool, "owned must be bool, but it is ",
                   owned.scalar_type());
  const at::Tensor mask = owned.to(right.device());
  const at::Tensor inside = mask.nonzero().flatten();
  const at::Tensor outside = mask.logical_not().nonzero().flatten();
  const at::Tensor rest = right.index_select(0, outside);
  const at::Tensor rest_keys = keys.index_select(0, outside);
  at::Tensor own = right.index_select(0, inside);
  at::Tensor among = at::mm(rest, rest_keys.t());
  among.diagonal().add_(diagonal);
  // M_SR M_RR^(-1) first: it has a row per owned token, Y_R has k columns.
  const auto [explained, info] =
      at::linalg_solve_ex(among, at::mm(own, rest_keys.t()), /*left=*/false);
  own = own - at::mm(explained, rest);
  TORCH_CHECK_LINALG(info.item<int32_t>() == 0 && at::isfinite(own).all().item<bool>(),
                     "the system of the answer tokens that are not owned is singular, so the "
                     "contribution of the others cannot be told from it");
  return LowRankUpdate(update.left().index_select(1, inside), own.to(update.right().scalar_type()));
}

}  // namespace

LowRankUpdate contribution(const LowRankUpdate& update, const at::Tensor& owned, double ridge) {
  TORCH_CHECK_VALUE(std::isfinite(ridge) && ridge > 0.0,
                    "ridge must be finite and positive, but it is ", ridge);
  const at::Tensor right = update.right().to(at::kDouble);
  return share(update, owned, right, right, ridge);
}

LowRankUpdate contribution(const LowRankUpdate& update, const at::Tensor& owned,
                           const at::Tensor& keys) {
  check_rows(keys, "keys", update.right().size(1));
  check_same_rows(keys, "keys", update.right(), "the update's right factor");
  check_finite(keys, "keys");
  return share(update, owned, update.right().to(at::kDouble), keys.to(at::kDouble), 1.0);
}

}  // namespace stableedit
