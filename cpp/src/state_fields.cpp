#include "state_fields.hpp"

#include <ATen/ops/empty.h>

#include "checks.hpp"

namespace stableedit {

at::Tensor integer_field(int64_t value) { return at::empty({}, at::kLong).fill_(value); }

at::Tensor number_field(double value) { return at::empty({}, at::kDouble).fill_(value); }

void add_part(StateDict& state, const std::string& prefix, const StateDict& part) {
  for (const auto& [name, tensor] : part) state.emplace(prefix + name, tensor);
}

at::Tensor StateReader::take(const std::string& name) {
  const auto field = rest_.extract(name);
  TORCH_CHECK_VALUE(field && field.mapped().defined(), "the state of a ", owner_, " lacks '", name,
                    "'");
  return field.mapped();
}

at::Tensor StateReader::tensor(const std::string& name, int64_t dims) {
  const at::Tensor value = take(name);
  const bool is_float = value.scalar_type() == at::kFloat || value.scalar_type() == at::kDouble;
  TORCH_CHECK_VALUE(value.dim() == dims && is_float, "'", name, "' in the state of a ", owner_,
                    " must be float32 or float64 with ", dims, " dimensions, but it is ",
                    value.scalar_type(), " of shape ", value.sizes());
  TORCH_CHECK_VALUE(at::isfinite(value).all().item<bool>(), "'", name, "' in the state of a ",
                    owner_, " contains NaN or infinite values");
  return value.detach().clone(at::MemoryFormat::Contiguous);
}

at::Tensor StateReader::statistic(const std::string& name, int64_t dims) {
  const at::Tensor value = tensor(name, dims);
  TORCH_CHECK_VALUE(value.scalar_type() == at::kDouble, "'", name, "' in the state of a ", owner_,
                    " must be float64, but it is ", value.scalar_type());
  return value;
}

int64_t StateReader::integer(const std::string& name, int64_t least, int64_t most) {
  const at::Tensor value = take(name);
  TORCH_CHECK_VALUE(value.dim() == 0 && value.scalar_type() == at::kLong, "'", name,
                    "' in the state of a ", owner_, " must be one int64, but it is ",
                    value.scalar_type(), " of shape ", value.sizes());
  const int64_t number = value.item<int64_t>();
  TORCH_CHECK_VALUE(number >= least && number <= most, "'", name, "' in the state of a ", owner_,
                    " must be from ", least, " to ", most, ", but it is ", number);
  return number;
}

double StateReader::number(const std::string& name) { return statistic(name, 0).item<double>(); }

StateDict StateReader::part(const std::string& prefix) {
  StateDict part;
  for (auto field = rest_.lower_bound(prefix);
       field != rest_.end() && field->first.starts_with(prefix); field = rest_.erase(field)) {
    part.emplace(field->first.substr(prefix.size()), field->second);
  }
  return part;
}

void StateReader::finish() const {
  TORCH_CHECK_VALUE(rest_.empty(), "the state of a ", owner_, " has an unknown field '",
                    rest_.empty() ? "" : shown(rest_.begin()->first), "'");
}

}  // namespace stableedit
