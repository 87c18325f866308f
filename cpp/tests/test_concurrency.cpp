// The concurrency contracts of the headers, each under as many threads as it allows.
// ThreadSanitizer (`make sanitize`) sees what the library itself reads and writes; what ATen's
// kernels do to the memory of a tensor shows in the bits, which must be those of one thread.

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <filesystem>
#include <functional>
#include <future>
#include <iterator>
#include <latch>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "stableedit/stableedit.hpp"

namespace stableedit {
namespace {

constexpr int64_t kKeyDim = 7;
constexpr int64_t kValueDim = 5;
constexpr int64_t kRows = 40;
constexpr unsigned kThreads = 4;
constexpr unsigned kRounds = 20;

/// Numbers in [-1, 1] without a pattern that would lower the rank.
at::Tensor matrix(int64_t rows, int64_t columns, unsigned seed) {
  const at::Tensor index = at::arange(1.0, static_cast<double>(rows * columns + 1), at::kDouble);
  return (index * index * (0.37 + seed)).sin().view({rows, columns}).to(at::kFloat);
}

at::Tensor keys(unsigned seed) { return matrix(kRows, kKeyDim, seed); }
at::Tensor gradients(unsigned seed) { return matrix(kRows, kValueDim, seed + 1000); }
at::Tensor weight() { return matrix(kValueDim, kKeyDim, 1); }

bool same_bits(const at::Tensor& a, const at::Tensor& b) { return a.equal(b); }

/// Calls `body(thread)` from kThreads threads that start together.
void together(const std::function<void(unsigned)>& body) {
  std::latch start(kThreads);
  std::vector<std::jthread> threads;
  for (unsigned thread = 0; thread < kThreads; ++thread) {
    threads.emplace_back([&start, &body, thread] {
      start.arrive_and_wait();
      body(thread);
    });
  }
}

NormalInverseWishart tracker() {
  NormalInverseWishart niw(kValueDim, {.kappa = 1.0, .psi = 0.5, .nu = 2.0});
  niw.update(gradients(1));
  return niw;
}

TEST(Concurrency, AnUpdateIsSharedByThreads) {
  const LowRankUpdate update = ridge_update(keys(1), gradients(1), 10.0);
  const LowRankUpdate other = ridge_update(keys(2), gradients(2), 10.0);
  const at::Tensor rows = at::arange(3, at::kLong);
  const at::Tensor dense = update.dense();
  at::Tensor added = weight();
  update.add_to(added);
  at::Tensor restored = added.clone();
  update.subtract_from(restored);

  together([&](unsigned) {
    for (unsigned round = 0; round < kRounds; ++round) {
      // That copies are shared, too, is the point. NOLINTNEXTLINE(performance-unnecessary-copy*)
      const LowRankUpdate copy = update;
      at::Tensor mine = weight();
      copy.add_to(mine);
      EXPECT_TRUE(same_bits(mine, added));
      copy.subtract_from(mine);
      EXPECT_TRUE(same_bits(mine, restored));
      EXPECT_TRUE(same_bits(update.dense(), dense));
      EXPECT_EQ(update.norm(), copy.norm());
      EXPECT_EQ(update.inner(other), copy.inner(other));
      EXPECT_EQ(update.select(rows).rank(), 3);
    }
  });
}

TEST(Concurrency, AWhitenerIsSharedByThreads) {
  const at::Tensor covariance = tracker().covariance();
  const at::Tensor rows = gradients(2);
  for (const Whitener& whitener :
       {Whitener::none(), Whitener::diagonal(covariance.diagonal().sqrt()),
        Whitener::full(covariance, 0.1, FloorMode::kRelative),
        Whitener::full(covariance, 0.1, FloorMode::kRelative, /*reused=*/true)}) {
    const at::Tensor expected = whitener.transform(rows);
    together([&](unsigned) {
      for (unsigned round = 0; round < kRounds; ++round) {
        const Whitener copy = whitener;
        EXPECT_TRUE(same_bits(copy.transform(rows), expected));
        EXPECT_TRUE(same_bits(whitener.transform(rows), expected));
      }
    });
  }
}

TEST(Concurrency, ConstMembersOfTheTrackersAreReadTogether) {
  RunningMoments moments(kKeyDim);
  moments.update(keys(1));
  const NormalInverseWishart niw = tracker();
  const at::Tensor stddev = moments.stddev();
  const at::Tensor covariance = niw.covariance();
  const at::Tensor upper = niw.covariance_upper(at::kFloat);
  together([&](unsigned) {
    for (unsigned round = 0; round < kRounds; ++round) {
      EXPECT_EQ(moments.count(), kRows);
      EXPECT_TRUE(same_bits(moments.stddev(), stddev));
      EXPECT_TRUE(same_bits(niw.covariance(), covariance));
      EXPECT_TRUE(same_bits(niw.covariance_upper(at::kFloat), upper));
      RunningMoments mine(kKeyDim);
      mine.merge(moments);  // reads `moments`
      EXPECT_TRUE(same_bits(mine.stddev(), stddev));
    }
  });
}

TEST(Concurrency, SnapshotsStayWhileTheOriginalMovesOn) {
  RunningMoments moments(kKeyDim);
  NormalInverseWishart niw = tracker();
  moments.update(keys(1));
  const RunningMoments moments_snapshot = moments;  // shares the tensors of the state
  const NormalInverseWishart niw_snapshot = niw;
  const at::Tensor mean = moments.mean().clone();
  const at::Tensor m2 = moments.m2().clone();
  const at::Tensor psi = niw.psi();
  together([&](unsigned thread) {
    for (unsigned round = 0; round < kRounds; ++round) {
      if (thread == 0) {  // the one that updates
        moments.update(keys(round));
        moments.merge(moments_snapshot);
        niw.update(gradients(round));
        niw.merge(niw_snapshot);
      } else {
        EXPECT_EQ(moments_snapshot.count(), kRows);
        EXPECT_TRUE(same_bits(moments_snapshot.mean(), mean));
        EXPECT_TRUE(same_bits(moments_snapshot.m2(), m2));
        EXPECT_TRUE(same_bits(niw_snapshot.psi(), psi));
      }
    }
  });
  EXPECT_EQ(moments.count(), kRows * (1 + 2 * int64_t{kRounds}));
}

// Copies of PastKeys share factorisations, too; exact and sketched.
TEST(Concurrency, EveryThreadSolvesWithItsOwnCopyOfThePastKeys) {
  for (const int64_t rank : {0, 3}) {
    PastKeys origin(kKeyDim, rank);
    origin.update(keys(1));
    origin.solve(keys(2), 0.1, 10.0);
    const at::Tensor moment = origin.second_moment();
    const auto run = [&origin](unsigned thread) {
      PastKeys mine = origin;
      at::Tensor solved;
      for (unsigned round = 0; round < kRounds; ++round) {
        mine.update(keys(thread + round));
        solved = mine.solve(keys(round), 0.1, 10.0);
      }
      return solved;
    };
    std::vector<at::Tensor> expected;
    for (unsigned thread = 0; thread < kThreads; ++thread) expected.push_back(run(thread));
    together([&](unsigned thread) {
      EXPECT_TRUE(same_bits(run(thread), expected[thread]));
      EXPECT_TRUE(same_bits(origin.second_moment(), moment));
    });
  }
}

/// Edits `turns` further turns and returns the last update.
at::Tensor edit_on(ModuleEditor& editor, unsigned first, unsigned turns) {
  at::Tensor dense;
  for (unsigned turn = first; turn < first + turns; ++turn) {
    dense = editor.edit(keys(turn), gradients(turn)).dense();
  }
  return dense;
}

// Copies share the state they started from, so a thread that wrote into it would change the others.
TEST(Concurrency, EveryThreadEditsOnItsOwnCopyOfTheStatistics) {
  NormalizerOptions options;
  options.whitening.refresh = 0.5;
  LifelongNormalizer origin(kKeyDim, kValueDim, options);
  for (unsigned turn = 0; turn < 3; ++turn) {
    origin.observe(keys(turn), gradients(turn));
    origin.normalize_value_gradients(gradients(turn));  // so that there is a whitener to share
  }
  const auto run = [&](unsigned thread) {
    ModuleEditor editor(std::make_shared<LifelongNormalizer>(origin), {.past_key_weight = 0.1});
    return edit_on(editor, 10 * (thread + 1), 10);
  };
  std::vector<at::Tensor> expected;
  for (unsigned thread = 0; thread < kThreads; ++thread) expected.push_back(run(thread));
  together([&](unsigned thread) { EXPECT_TRUE(same_bits(run(thread), expected[thread])); });
  EXPECT_EQ(origin.count(), 3 * kRows);
}

// One thread computes the updates, another owns the weight: nothing but the updates is shared.
TEST(Concurrency, UpdatesAreHandedToTheThreadThatOwnsTheWeight) {
  std::vector<std::promise<LowRankUpdate>> turns(kRounds);
  at::Tensor live = weight();
  {
    const std::jthread editing([&turns] {
      ModuleEditor editor(kKeyDim, kValueDim);
      for (unsigned turn = 0; turn < kRounds; ++turn) {
        turns[turn].set_value(editor.edit(keys(turn), gradients(turn)));
      }
    });
    const std::jthread serving([&turns, &live] {
      MasterWeight master(live);
      std::vector<LowRankUpdate> applied;
      for (std::promise<LowRankUpdate>& turn : turns) {
        applied.push_back(turn.get_future().get());
        master.apply(applied.back());
      }
      for (const LowRankUpdate& update : applied) master.revert(update);
    });
  }
  EXPECT_TRUE(same_bits(live, weight()));
}

// A state is a snapshot: one thread saves it while another goes on with the object.
TEST(Concurrency, AStateIsSavedWhileItsObjectMovesOn) {
  NormalizerOptions options;
  options.whitening.refresh = 0.5;
  ModuleEditor editor(kKeyDim, kValueDim, options, {.past_key_weight = 0.1});
  edit_on(editor, 0, 3);
  const SafeTensors statistics{.tensors = editor.normalizer().state_dict()};
  const SafeTensors past{.tensors = editor.past_keys()->state_dict()};
  const std::string statistics_bytes = serialize_safetensors(statistics);
  const std::string past_bytes = serialize_safetensors(past);
  together([&](unsigned thread) {
    if (thread == 0) {  // the one that edits
      edit_on(editor, 10, kRounds);
      return;
    }
    for (unsigned round = 0; round < kRounds; ++round) {
      EXPECT_EQ(serialize_safetensors(statistics), statistics_bytes);
      EXPECT_EQ(serialize_safetensors(past), past_bytes);
    }
  });
}

TEST(Concurrency, APatchIsAppliedByThreadsToTheirOwnWeights) {
  Patch patch;
  patch.modules.emplace("up", WeightChange{ridge_update(keys(1), gradients(1), 10.0)});
  patch.modules.emplace("down", WeightChange{weight()});
  const auto apply = [&patch] {
    const std::map<std::string, at::Tensor> weights{{"up", weight()}, {"down", weight()}};
    patch.add_to(weights);
    return weights;
  };
  const auto expected = apply();
  together([&](unsigned) {
    for (unsigned round = 0; round < kRounds; ++round) {
      for (const auto& [module, mine] : apply()) EXPECT_TRUE(same_bits(mine, expected.at(module)));
    }
  });
}

// Whoever reads a file that others write finds what one of them wrote, whole.
TEST(Concurrency, OneFileIsReadAndWrittenByThreads) {
  namespace fs = std::filesystem;
  const fs::path directory = fs::path(testing::TempDir()) / "stableedit_concurrency";
  fs::remove_all(directory);
  fs::create_directory(directory);
  const fs::path path = directory / "file.safetensors";
  const auto save = [&path](unsigned writer) {
    save_safetensors(path, {.tensors = {{"keys", keys(writer)}},
                            .metadata = {{"writer", std::to_string(writer)}}});
  };
  save(0);
  together([&](unsigned thread) {
    for (unsigned round = 0; round < kRounds; ++round) {
      if (thread % 2 == 0) save(thread);
      const SafeTensors content = load_safetensors(path);
      EXPECT_TRUE(content.checksummed);
      const auto writer = static_cast<unsigned>(std::stoul(content.metadata.at("writer")));
      EXPECT_TRUE(same_bits(content.tensors.at("keys"), keys(writer)));
    }
  });
  EXPECT_EQ(std::distance(fs::directory_iterator(directory), fs::directory_iterator()), 1);
  fs::remove_all(directory);
}

// `check` and `clone` only read.
TEST(Concurrency, ConstMembersOfAMasterWeightAreReadTogether) {
  at::Tensor live = weight().to(at::kBFloat16);
  const MasterWeight master(live);
  const LowRankUpdate update = ridge_update(keys(1), gradients(1), 10.0);
  together([&](unsigned) {
    for (unsigned round = 0; round < kRounds; ++round) {
      master.check(update);
      MasterWeight mine = master.clone();
      mine.apply(update);
      mine.restore(master);
      EXPECT_TRUE(same_bits(mine.live(), live));
    }
  });
}

}  // namespace
}  // namespace stableedit
