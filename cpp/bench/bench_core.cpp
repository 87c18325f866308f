// What each operation of a turn costs, at the shapes of real models: n answer tokens, a down_proj
// with k inputs and v outputs. `bench/` (Python) compares whole turns with the published
// formulation; this is for finding out which operation to look at.
//
//     stableedit_bench --benchmark_filter=Ridge --benchmark_format=json

#include <ATen/Parallel.h>
#include <ATen/ops/randn.h>
#include <benchmark/benchmark.h>
#include <torch/headeronly/version.h>

#include <cstdint>
#include <string>

#include "stableedit/stableedit.hpp"

namespace stableedit {
namespace {

// {n, k, v} of SmolLM2-135M and of Mistral-7B, at about 100 requests a turn.
void shapes(benchmark::internal::Benchmark* bench) {
  bench->ArgNames({"n", "k", "v"})
      ->Args({400, 1536, 576})
      ->Args({400, 14336, 4096})
      ->Unit(benchmark::kMillisecond)
      ->UseRealTime();
}

struct Turn {
  explicit Turn(const benchmark::State& state)
      : n(state.range(0)), k(state.range(1)), v(state.range(2)) {}

  at::Tensor keys() const { return at::randn({n, k}, at::kFloat); }
  at::Tensor gradients() const { return at::randn({n, v}, at::kFloat); }
  at::Tensor weight(at::ScalarType dtype) const { return at::randn({v, k}, at::kFloat).to(dtype); }
  LowRankUpdate update() const { return ridge_update(keys(), gradients(), 10.0); }

  /// Enough samples for a covariance, cheaply: one batch merged with itself until nu > v + 1.
  NormalInverseWishart tracker() const {
    NormalInverseWishart niw(v);
    niw.update(gradients());
    while (!niw.has_covariance()) niw.merge(niw);
    return niw;
  }

  int64_t n, k, v;
};

void MomentsUpdate(benchmark::State& state) {
  const Turn turn(state);
  const at::Tensor keys = turn.keys();
  RunningMoments moments(turn.k);
  for (auto _ : state) moments.update(keys);
}
BENCHMARK(MomentsUpdate)->Apply(shapes);

void NiwUpdate(benchmark::State& state) {
  const Turn turn(state);
  const at::Tensor gradients = turn.gradients();
  NormalInverseWishart niw = turn.tracker();
  for (auto _ : state) niw.update(gradients);
}
BENCHMARK(NiwUpdate)->Apply(shapes);

void WhitenerDecompose(benchmark::State& state) {
  const NormalInverseWishart niw = Turn(state).tracker();
  for (auto _ : state) {
    benchmark::DoNotOptimize(
        Whitener::full(niw.covariance_upper(at::kFloat), 0.1, FloorMode::kRelative, true));
  }
}
BENCHMARK(WhitenerDecompose)->Apply(shapes);

void WhitenerTransform(benchmark::State& state) {
  const Turn turn(state);
  const Whitener whitener =
      Whitener::full(turn.tracker().covariance_upper(at::kFloat), 0.1, FloorMode::kRelative, true);
  const at::Tensor gradients = turn.gradients();
  for (auto _ : state) benchmark::DoNotOptimize(whitener.transform(gradients));
}
BENCHMARK(WhitenerTransform)->Apply(shapes);

void RidgeUpdate(benchmark::State& state) {
  const Turn turn(state);
  const at::Tensor keys = turn.keys();
  const at::Tensor targets = turn.gradients();
  for (auto _ : state) benchmark::DoNotOptimize(ridge_update(keys, targets, 10.0));
}
BENCHMARK(RidgeUpdate)->Apply(shapes);

void LowRankAdd(benchmark::State& state) {
  const Turn turn(state);
  const LowRankUpdate update = turn.update();
  const at::Tensor weight = turn.weight(at::kFloat);
  for (auto _ : state) update.add_to(weight);
}
BENCHMARK(LowRankAdd)->Apply(shapes);

// The pause of a server that applies an update to the weight it serves from.
void MasterWeightApply(benchmark::State& state, at::ScalarType dtype, bool exact_revert) {
  const Turn turn(state);
  const LowRankUpdate update = turn.update();
  MasterWeight weight(turn.weight(dtype), WeightLayout::kLinear, exact_revert);
  for (auto _ : state) weight.apply(update);
}
BENCHMARK_CAPTURE(MasterWeightApply, float32, at::kFloat, false)->Apply(shapes);
BENCHMARK_CAPTURE(MasterWeightApply, float32_exact, at::kFloat, true)->Apply(shapes);
BENCHMARK_CAPTURE(MasterWeightApply, bfloat16_exact, at::kBFloat16, true)->Apply(shapes);

// A whole turn of one module, late in a stream, when a decomposition is reused.
void ModuleEditorEdit(benchmark::State& state) {
  const Turn turn(state);
  NormalizerOptions options;
  options.whitening.refresh = 1.0;
  ModuleEditor editor(turn.k, turn.v, options);
  const at::Tensor keys = turn.keys();
  const at::Tensor gradients = turn.gradients();
  editor.normalizer().observe(keys, gradients);
  while (editor.normalizer().effective_mode() != WhiteningMode::kFull ||
         editor.normalizer().count() < 1'000'000) {
    editor.normalizer().merge(editor.normalizer());
  }
  benchmark::DoNotOptimize(editor.edit(keys, gradients));  // decomposes
  for (auto _ : state) benchmark::DoNotOptimize(editor.edit(keys, gradients));
}
BENCHMARK(ModuleEditorEdit)->Apply(shapes);

}  // namespace
}  // namespace stableedit

int main(int argc, char** argv) {
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  benchmark::AddCustomContext("torch", TORCH_VERSION);
  benchmark::AddCustomContext("threads", std::to_string(at::get_num_threads()));
  benchmark::RunSpecifiedBenchmarks();
}
