#include <string>
#include <utility>
#include <vector>

#include "model/gguf.h"
#include "model/gguf_malformed_cases.h"

namespace stagecoach {

MalformedCase Changed(std::string name, std::optional<ModelError> expected, std::string mentions,
                      std::function<void(GgufImage&)> change) {
  const auto parts = [change = std::move(change)] {
    GgufImage image = TinyLlamaImage();
    change(image);
    return std::vector<std::string>{image.Bytes()};
  };
  return {std::move(name), parts, expected, std::move(mentions)};
}

MalformedCase Patched(std::string name, ModelError expected, std::string mentions,
                      std::function<void(std::string&)> change) {
  const auto parts = [change = std::move(change)] {
    std::string bytes = TinyLlamaImage().Bytes();
    change(bytes);
    return std::vector<std::string>{std::move(bytes)};
  };
  return {std::move(name), parts, expected, std::move(mentions)};
}

std::string Join(const std::string& a, uint64_t b) { return a + std::to_string(b); }

std::vector<MalformedCase> HeaderCases() {
  std::vector<MalformedCase> cases;
  for (const size_t size : {0, 1, 3, 4, 7, 8, 15, 16, 20, 23}) {
    cases.push_back(Patched(Join("01_size_", size), ModelError::kTruncated, "byte",
                            [size](std::string& bytes) { bytes.resize(size); }));
  }
  for (const std::string magic : {"GGML", "tjgg", "lmgg",
                                  "\x7f"
                                  "ELF",
                                  "FUGG"}) {
    cases.push_back(Changed(Join("02_magic_", cases.size()), ModelError::kBadMagic, "byte 0",
                            [magic](GgufImage& image) { image.magic = magic; }));
  }
  for (const uint32_t version : {0u, 1u, 4u, 1u << 31, 0xffffffffu}) {
    cases.push_back(Changed(Join("03_version_", version), ModelError::kBadVersion, "byte 4",
                            [version](GgufImage& image) { image.version = version; }));
  }
  for (const uint32_t version : {1u, 2u, 3u}) {
    cases.push_back(
        Changed(Join("04_big_endian_", version), ModelError::kBadVersion, "endian",
                [version](GgufImage& image) { image.version = __builtin_bswap32(version); }));
  }
  for (const uint64_t count : {kMax64, kTwo63, kMaxTensors + 1}) {
    cases.push_back(Changed(Join("05_tensor_count_", count), ModelError::kLimit, "byte 8",
                            [count](GgufImage& image) { image.tensor_count = count; }));
  }
  for (const uint64_t count : {kMax64, kTwo63, kMaxMetadataKeys + 1}) {
    cases.push_back(Changed(Join("06_key_count_", count), ModelError::kLimit, "byte 16",
                            [count](GgufImage& image) { image.key_count = count; }));
  }
  cases.push_back(Changed("07_more_tensors_than_bytes", ModelError::kTruncated, "60000 tensors",
                          [](GgufImage& image) { image.tensor_count = 60'000; }));
  cases.push_back(Changed("07_more_keys_than_bytes", ModelError::kTruncated, "60000 keys",
                          [](GgufImage& image) { image.key_count = 60'000; }));
  for (const int extra : {1, 2, 5}) {
    cases.push_back(
        Changed(Join("08_slide_", extra), ModelError::kBadType, "key count",
                [extra](GgufImage& image) { image.key_count = image.keys.size() + extra; }));
  }
  cases.push_back(
      Changed("08_slide_off_the_end", ModelError::kTruncated, "byte", [](GgufImage& image) {
        image.key_count = image.keys.size() + 1;
        image.tensors.clear();
        image.data.clear();
        image.alignment = 1;
      }));
  return cases;
}

namespace {

std::string ManyKeys(uint64_t count) {
  std::string bytes = "GGUF" + RawU32(3) + RawU64(0) + RawU64(count);
  for (uint64_t i = 0; i < count; ++i) {
    bytes += RawString(std::to_string(i)) + RawU32(kGgufU8) + RawU8(0);
  }
  return bytes;
}

}  // namespace

std::vector<MalformedCase> KeyCases() {
  std::vector<MalformedCase> cases = {
      {"09_a_million_keys", [] { return std::vector{ManyKeys(1'000'000)}; }, ModelError::kLimit,
       "1000000"},
      {"09_as_many_keys_as_allowed", [] { return std::vector{ManyKeys(kMaxMetadataKeys)}; },
       ModelError::kMissingKey, "llama.block_count"},
  };
  for (const uint64_t length : {kMax64, kTwo63, uint64_t{65'536}, uint64_t{60'000}}) {
    cases.push_back(Changed(Join("10_key_length_", length), ModelError::kLimit, "length",
                            [length](GgufImage& image) { image.keys[2].name_length = length; }));
  }
  const std::string bad_names[] = {
      "",         std::string("a\0b", 3), "a\nb",    "a\x1b[2Jb", "\xff\xfe",
      "\xc0\xaf", "\xed\xa0\x80",         "caf\xc3", "\xc2\x85"};
  for (const std::string& name : bad_names) {
    cases.push_back(Changed(Join("11_key_name_", cases.size()), ModelError::kBadKey, "byte",
                            [name](GgufImage& image) { image.keys[3].name = name; }));
  }
  cases.push_back(Changed("12_same_key_same_value", ModelError::kDuplicate, "llama.block_count",
                          [](GgufImage& image) { image.keys.push_back(image.keys[2]); }));
  cases.push_back(Changed("12_same_key_other_value", ModelError::kDuplicate, "general.name",
                          [](GgufImage& image) {
                            image.keys.push_back({"general.name", kGgufU32, RawU32(1)});
                          }));
  for (const uint32_t type : {13u, 255u, 0xffffffffu, 1u << 31}) {
    cases.push_back(Changed(Join("13_value_type_", type), ModelError::kBadType, "general.name",
                            [type](GgufImage& image) { image.key("general.name").type = type; }));
    cases.push_back(Changed(Join("13_element_type_", type), ModelError::kBadType, "'extra'",
                            [type](GgufImage& image) {
                              image.Set("extra", kGgufArray, RawArray(type, 1, RawU64(0)));
                            }));
  }
  for (const uint8_t byte : {2, 128, 255}) {
    cases.push_back(
        Changed(Join("19_bool_", byte), ModelError::kBadType, "no bool",
                [byte](GgufImage& image) { image.Set("flag", kGgufBool, RawU8(byte)); }));
    cases.push_back(Changed(
        Join("19_bool_element_", byte), ModelError::kBadType, "no bool", [byte](GgufImage& image) {
          image.Set("flags", kGgufArray, RawArray(kGgufBool, 2, RawU8(1) + RawU8(byte)));
        }));
  }
  return cases;
}

namespace {

MalformedCase BadArray(std::string name, ModelError expected, uint32_t type, uint64_t count,
                       std::string elements) {
  return Changed(std::move(name), expected, "'array' at byte",
                 [type, count, elements](GgufImage& image) {
                   image.Set("array", kGgufArray, RawArray(type, count, elements));
                 });
}

}  // namespace

std::vector<MalformedCase> ArrayAndStringCases() {
  std::string deep;  // arrays of one array each
  for (int i = 0; i < 10'000; ++i) deep += RawU32(kGgufArray) + RawU64(1);
  std::vector<MalformedCase> cases = {
      BadArray("14_array_of_arrays", ModelError::kUnsupported, kGgufArray, 1,
               RawArray(kGgufU8, 1, RawU8(1))),
      BadArray("14_depth_bomb", ModelError::kUnsupported, kGgufArray, 1, deep),
      BadArray("14_no_arrays_at_all", ModelError::kUnsupported, kGgufArray, 0, ""),
      BadArray("15_count_2_63_bytes", ModelError::kOverflow, kGgufU8, kTwo63, "x"),
      BadArray("15_count_2_63_bools", ModelError::kOverflow, kGgufBool, kTwo63, "x"),
      BadArray("15_count_max_strings", ModelError::kOverflow, kGgufString, kMax64, "x"),
      BadArray("15_count_times_8_wraps", ModelError::kOverflow, kGgufU64, kTwo63 / 4 + 1, "x"),
      BadArray("15_count_times_4_wraps_to_4", ModelError::kOverflow, kGgufF32, kTwo63 / 2 + 1,
               "1234"),
      BadArray("15_more_than_the_limit", ModelError::kLimit, kGgufU8, kMaxArrayElements + 1,
               std::string(kMaxArrayElements + 1, 'x')),
      BadArray("16_a_thousand_million_floats", ModelError::kTruncated, kGgufF32, 1'000'000'000, ""),
      BadArray("16_four_million_strings", ModelError::kTruncated, kGgufString, 4'000'000, ""),
      BadArray("16_four_million_bools", ModelError::kTruncated, kGgufBool, 4'000'000, ""),
      BadArray("17_string_overruns", ModelError::kTruncated, kGgufString, 2,
               RawString("fine") + RawU64(1'000'000)),
      BadArray("17_string_length_max", ModelError::kTruncated, kGgufString, 2,
               RawString("fine") + RawU64(kMax64)),
      BadArray("18_element_over_the_cap", ModelError::kLimit, kGgufString, 1,
               RawString(std::string(kMaxStringBytes + 1, 'x'))),
      // 2 M one-byte strings: 18 MB of file that would take 100 MB of memory.
      BadArray("18_strings_over_the_memory_limit", ModelError::kLimit, kGgufString, 2 << 20,
               [] {
                 std::string elements;
                 for (int i = 0; i < 2 << 20; ++i) elements += RawU64(1) + "x";
                 return elements;
               }()),
  };
  for (const uint64_t length : {kMax64, kTwo63, kMaxStringBytes + 1}) {
    cases.push_back(Changed(
        Join("18_string_length_", length), ModelError::kLimit, "'text' at byte",
        [length](GgufImage& image) { image.Set("text", kGgufString, RawU64(length) + "abc"); }));
  }
  cases.push_back(
      Changed("18_five_large_strings", ModelError::kLimit, "memory", [](GgufImage& image) {
        for (int i = 0; i < 5; ++i) {
          image.SetString("text" + std::to_string(i), std::string(kMaxStringBytes, 'x'));
        }
      }));
  return cases;
}

std::vector<MalformedCase> AlignmentCases() {
  std::vector<MalformedCase> cases;
  for (const uint32_t alignment : {0u, 3u, 13u, 31u, 1u << 31, 0xffffffffu, 1u << 17}) {
    cases.push_back(Changed(
        Join("20_alignment_", alignment), ModelError::kBadAlign, "'general.alignment' at byte",
        [alignment](GgufImage& image) { image.SetU32("general.alignment", alignment); }));
  }
  cases.push_back(Changed("22_alignment_string", ModelError::kBadType, "general.alignment",
                          [](GgufImage& image) { image.SetString("general.alignment", "32"); }));
  cases.push_back(Changed("22_alignment_float", ModelError::kBadType, "general.alignment",
                          [](GgufImage& image) { image.SetF32("general.alignment", 32); }));
  cases.push_back(
      Changed("22_alignment_negative", ModelError::kBadType, "general.alignment",
              [](GgufImage& image) { image.Set("general.alignment", kGgufI32, RawU32(-32)); }));
  return cases;
}

}  // namespace stagecoach
