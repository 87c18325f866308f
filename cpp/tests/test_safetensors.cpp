// The container: round trips through memory and disk, damage, and writes that are all or nothing.
// What makes a header invalid is tested case by case in tests/test_serialization.py.

#include <ATen/ops/arange.h>
#include <ATen/ops/eye.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>

#include "oracle.hpp"
#include "stableedit/safetensors.hpp"

namespace stableedit {
namespace {

namespace fs = std::filesystem;
using oracle::refuses;
using oracle::same_bits;

/// A directory that is empty at first and gone afterwards.
class SafeTensorsFile : public testing::Test {
 protected:
  SafeTensorsFile() {
    const auto* test = testing::UnitTest::GetInstance()->current_test_info();
    directory_ = fs::path(testing::TempDir()) / (std::string("stableedit_") + test->name());
    fs::remove_all(directory_);
    fs::create_directory(directory_);
    path_ = directory_ / "file.safetensors";
  }
  ~SafeTensorsFile() override { fs::remove_all(directory_); }

  int64_t files() const {
    return std::distance(fs::directory_iterator(directory_), fs::directory_iterator());
  }

  fs::path directory_;
  fs::path path_;
};

SafeTensors example() {
  return {.tensors = {{"matrix", at::arange(12, at::kDouble).reshape({3, 4})},
                      {"half", at::ones({5}, at::kHalf)},
                      {"number", at::ones({}, at::kLong)},
                      {"empty", at::zeros({0, 7})},
                      {"flags", at::ones({3}, at::kBool)},
                      {"transposed", at::arange(6, at::kFloat).reshape({2, 3}).t()}},
          .metadata = {{"config", "{\"a\": [1, \"zwei\"]}\n"}, {"empty", ""}}};
}

void expect_equal(const SafeTensors& actual, const SafeTensors& expected) {
  EXPECT_EQ(actual.metadata, expected.metadata);
  ASSERT_EQ(actual.tensors.size(), expected.tensors.size());
  for (const auto& [name, tensor] : expected.tensors) {
    ASSERT_TRUE(actual.tensors.contains(name)) << name;
    EXPECT_TRUE(same_bits(actual.tensors.at(name), tensor)) << name;
  }
}

TEST(SafeTensors, RoundTripThroughMemory) {
  const SafeTensors read = parse_safetensors(serialize_safetensors(example()));
  expect_equal(read, example());
  EXPECT_TRUE(read.checksummed);
}

TEST(SafeTensors, NothingAtAllIsAFile) {
  expect_equal(parse_safetensors(serialize_safetensors({})), {});
}

TEST(SafeTensors, EveryFlippedBitIsFound) {
  const std::string whole = serialize_safetensors(example());
  for (size_t i = 0; i < whole.size(); ++i) {
    for (int bit = 0; bit < 8; ++bit) {
      std::string damaged = whole;
      damaged[i] = static_cast<char>(damaged[i] ^ (1 << bit));
      // The one change that no checksum sees is that of its own name; files of ours must have it.
      try {
        EXPECT_FALSE(parse_safetensors(damaged).checksummed) << "byte " << i << ", bit " << bit;
      } catch (const c10::ValueError&) {
      }
    }
  }
}

TEST(SafeTensors, EveryTruncationIsFound) {
  const std::string whole = serialize_safetensors(example());
  for (size_t size = 0; size < whole.size(); ++size) {
    EXPECT_THROW(parse_safetensors(std::string_view(whole).substr(0, size)), c10::ValueError)
        << size;
  }
  EXPECT_TRUE(refuses<c10::ValueError>([&] { parse_safetensors(whole + "x", "the upload"); },
                                       {"the upload has", "bytes of tensors"}));
}

TEST_F(SafeTensorsFile, RoundTripThroughTheDisk) {
  save_safetensors(path_, example());
  expect_equal(load_safetensors(path_), example());
  save_safetensors(path_, {.metadata = {{"second", "one"}}});
  EXPECT_EQ(load_safetensors(path_).metadata.at("second"), "one");
  EXPECT_EQ(files(), 1);
}

TEST_F(SafeTensorsFile, ARefusedWriteChangesNothing) {
  save_safetensors(path_, example());
  const SafeTensors bad{
      .tensors = {{"fine", at::ones({3})}, {"x", at::ones({1}, at::kComplexDouble)}}};
  EXPECT_TRUE(refuses<c10::ValueError>([&] { save_safetensors(path_, bad); }, {"ComplexDouble"}));
  const SafeTensors name{.tensors = {{"\xff", at::ones({3})}}};
  EXPECT_TRUE(refuses<c10::ValueError>([&] { save_safetensors(path_, name); }, {"UTF-8"}));
  expect_equal(load_safetensors(path_), example());
  EXPECT_EQ(files(), 1);
}

TEST_F(SafeTensorsFile, MissingFilesAndDirectoriesAreErrorsOfTheFileSystem) {
  EXPECT_THROW(load_safetensors(path_), fs::filesystem_error);
  EXPECT_THROW(load_safetensors(directory_), fs::filesystem_error);
  EXPECT_THROW(save_safetensors(directory_, example()), fs::filesystem_error);
  EXPECT_THROW(save_safetensors(directory_ / "absent" / "file", example()), fs::filesystem_error);
  EXPECT_EQ(files(), 0);
}

// Names are for people: on one line, and not longer than they are read.
TEST(SafeTensors, MessagesShowTextFromAFileOnOneLine) {
  const auto message = [](const std::string& dtype) {
    const std::string header =
        "{\"w\":{\"dtype\":\"" + dtype + "\",\"shape\":[],\"data_offsets\":[0,0]}}";
    const uint64_t length = header.size();
    try {
      parse_safetensors(std::string(reinterpret_cast<const char*>(&length), 8) + header, "f");
    } catch (const c10::ValueError& error) {
      return std::string(error.what_without_backtrace());
    }
    return std::string("accepted");
  };
  EXPECT_EQ(message("a\\nb"), "f: tensor 'w' has dtype 'a?b', which is not supported");
  std::string umlauts;
  for (int i = 0; i < 99; ++i) umlauts += "ä";
  EXPECT_EQ(message("x" + umlauts),  // cut between two characters, at most 100 bytes
            "f: tensor 'w' has dtype 'x" + umlauts.substr(0, 98) + "...', which is not supported");
}

}  // namespace
}  // namespace stableedit
