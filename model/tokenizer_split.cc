#define PCRE2_CODE_UNIT_WIDTH 8
#include "model/tokenizer_split.h"

#include <pcre2.h>

#include <algorithm>
#include <string>
#include <utility>

#include "fmt/format.h"
#include "model/model_error.h"
#include "model/status_macros.h"
#include "model/tokenizer.h"
#include "model/unicode.h"

namespace stagecoach {
namespace {

// The patterns that the models' authors published (tokenizer.json of each model), with `(?i:...)`
// written out and `\s+$` guarded so that long runs of spaces take linear time. PCRE2's `\s` also
// has U+180E, which Unicode no longer counts as white space.
#define STAGECOACH_CONTRACTIONS R"('(?:[sStTmMdD]|[rR][eE]|[vV][eE]|[lL][lL]))"
#define STAGECOACH_REST R"( ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)"
#define STAGECOACH_REST_WITH_SLASH R"( ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+)"
#define STAGECOACH_UPPER R"([\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}])"
#define STAGECOACH_LOWER R"([\p{Ll}\p{Lm}\p{Lo}\p{M}])"
#define STAGECOACH_CASED(upper_count, lower_count) \
  R"([^\r\n\p{L}\p{N}]?)" STAGECOACH_UPPER upper_count STAGECOACH_LOWER lower_count

constexpr char kGpt2[] =
    R"('(?:[stmd]|re|ve|ll)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";
constexpr char kLlama3[] =
    STAGECOACH_CONTRACTIONS R"(|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|)" STAGECOACH_REST;
constexpr char kQwen2[] =
    STAGECOACH_CONTRACTIONS R"(|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|)" STAGECOACH_REST;
constexpr char kTekken[] = STAGECOACH_CASED("*", "+") "|" STAGECOACH_CASED(
    "+", "*") R"(|\p{N}|)" STAGECOACH_REST_WITH_SLASH;
constexpr char kGpt4o[] =
    STAGECOACH_CASED("*", "+") "(?:" STAGECOACH_CONTRACTIONS ")?|" STAGECOACH_CASED(
        "+", "*") "(?:" STAGECOACH_CONTRACTIONS R"()?|\p{N}{1,3}|)" STAGECOACH_REST_WITH_SLASH;
constexpr char kDigit[] = R"(\p{N})";
constexpr char kDigits[] = R"(\p{N}+)";
constexpr char kThreeDigits[] = "[0-9][0-9][0-9]";
constexpr char kDefaultPunctuation[] = R"([\p{P}$+<=>^~|]+)";
constexpr char kFalconPunctuation[] = R"([\p{P}$+<=>^~|`]+)";
constexpr char kLineBreak[] = R"([\r\n])";
constexpr char kCjk[] = R"([\x{4E00}-\x{9FA5}\x{800}-\x{4E00}\x{AC00}-\x{D7FF}]+)";
constexpr char kDeepseekLetters[] =
    R"(\s?[A-Za-z\x{B5}\x{C0}-\x{D6}\x{D8}-\x{F6}\x{F8}-\x{1BA}\x{1BC}-\x{1BF}\x{1C4}-\x{293})"
    R"(\x{295}-\x{2AF}\x{370}-\x{373}\x{376}\x{377}\x{37B}-\x{37D}\x{37F}\x{386})"
    R"(\x{388}-\x{38A}\x{38C}\x{38E}-\x{3A1}\x{3A3}-\x{3F5}\x{3F7}-\x{481}\x{48A}-\x{52F})"
    R"(\x{531}-\x{556}\x{10A0}-\x{10C5}\x{13A0}-\x{13F5}\x{13F8}-\x{13FD}\x{1C90}-\x{1CBA})"
    R"(\x{1CBD}-\x{1CBF}\x{1D00}-\x{1D2B}\x{1D6B}-\x{1D77}\x{1D79}-\x{1D9A}\x{1E00}-\x{1F15})"
    R"(\x{1F18}-\x{1F1D}\x{1F20}-\x{1F45}\x{1F48}-\x{1F4D}\x{1F50}-\x{1F57}\x{1F59}\x{1F5B})"
    R"(\x{1F5D}\x{1F5F}-\x{1F7D}\x{1F80}-\x{1FB4}\x{1FB6}-\x{1FBC}\x{1FBE}\x{1FC2}-\x{1FC4})"
    R"(\x{1FC6}-\x{1FCC}\x{1FD0}-\x{1FD3}\x{1FD6}-\x{1FDB}\x{1FE0}-\x{1FEC}\x{1FF2}-\x{1FF4})"
    R"(\x{1FF6}-\x{1FFC}\x{2102}\x{2107}\x{210A}-\x{2113}\x{2115}\x{2119}-\x{211D}\x{2124})"
    R"(\x{2126}\x{2128}\x{212A}-\x{212D}\x{212F}-\x{2134}\x{2139}\x{213C}-\x{213F})"
    R"(\x{2145}-\x{2149}\x{214E}\x{2183}\x{2184}\x{2C00}-\x{2C7B}\x{2C7E}-\x{2CE4})"
    R"(\x{2CEB}-\x{2CEE}\x{2CF2}\x{2CF3}\x{A640}-\x{A66D}\x{A680}-\x{A69B}\x{A722}-\x{A76F})"
    R"(\x{A771}-\x{A787}\x{A78B}-\x{A78E}\x{AB70}-\x{ABBF}\x{FB00}-\x{FB06}\x{FB13}-\x{FB17})"
    R"(\x{FF21}-\x{FF3A}\x{FF41}-\x{FF5A}\x{10400}-\x{1044F}\x{104B0}-\x{104D3})"
    R"(\x{104D8}-\x{104FB}\x{10C80}-\x{10CB2}\x{10CC0}-\x{10CF2}\x{118A0}-\x{118DF})"
    R"(\x{1E900}-\x{1E943}]+)";
constexpr char kDeepseekPunctuation[] =
    R"(\s?[!-/:-~\x{FF01}-\x{FF0F}\x{FF1A}-\x{FF5E}\x{2018}-\x{201F}\x{3000}-\x{3002}]+)";
constexpr char kTrailingSpace[] = R"((?<!\s)\s+$)";
constexpr char kSpaceLetters[] = R"(\s?\p{L}+)";
constexpr char kSpacePunctuation[] = R"(\s?\p{P}+)";

// One way of cutting, and the values of tokenizer.ggml.pre that mean it.
struct Recipe {
  std::vector<std::string_view> names;
  std::vector<const char*> patterns;
  bool whole_words = false;
  bool adds_bos = false;
};

const std::vector<Recipe>& Recipes() {
  static const auto* recipes = new std::vector<Recipe>{
      {{"default"}, {kDefaultPunctuation, kGpt2, kDigits, kThreeDigits}},
      {{"gpt-2", "phi-2", "mpt", "olmo", "jais"}, {kGpt2}},
      {{"llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral"}, {kLlama3}, true, true},
      {{"dbrx", "smaug-bpe", "glm4", "chatglm-bpe"}, {kLlama3}},
      {{"qwen2", "stablelm2", "deepseek-r1-qwen", "megrez"}, {kQwen2}},
      {{"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"},
       {kDigit, kGpt2}},
      {{"tekken"}, {kTekken}, true, true},
      {{"gpt-4o", "llama4"}, {kGpt4o}},
      {{"falcon"}, {kFalconPunctuation, kGpt2, kThreeDigits}},
      {{"deepseek-llm"},
       {kLineBreak, kDeepseekLetters, kDeepseekPunctuation, kTrailingSpace, kCjk, kDigits}},
      {{"deepseek-coder"}, {kLineBreak, kSpaceLetters, kSpacePunctuation, kCjk, kDigit}},
  };
  return *recipes;
}

std::string SupportedNames() {
  std::string all;
  for (const Recipe& recipe : Recipes()) {
    for (const std::string_view name : recipe.names) {
      if (!all.empty()) all += ", ";
      all += name;
    }
  }
  return all;
}

// Bounds on one search. Every pattern is linear in the text up to a small factor.
constexpr uint32_t kMatchLimit = 4 * kMaxEncodeBytes;
constexpr uint32_t kHeapLimitKib = 64 << 10;

std::string EngineMessage(int code) {
  PCRE2_UCHAR buffer[256] = {};
  pcre2_get_error_message(code, buffer, sizeof(buffer));
  return reinterpret_cast<const char*>(buffer);
}

template <auto kFree>
struct Free {
  template <typename T>
  void operator()(T* object) const {
    kFree(object);
  }
};
using Code = std::unique_ptr<pcre2_code, Free<pcre2_code_free>>;
using MatchContext = std::unique_ptr<pcre2_match_context, Free<pcre2_match_context_free>>;
using MatchData = std::unique_ptr<pcre2_match_data, Free<pcre2_match_data_free>>;

}  // namespace

// One compiled pattern. Immutable; thread-safe.
class PreTokenizer::Pattern {
 public:
  static absl::StatusOr<std::unique_ptr<Pattern>> Compile(const char* pattern) {
    int error = 0;
    PCRE2_SIZE offset = 0;
    Code code(pcre2_compile(reinterpret_cast<PCRE2_SPTR>(pattern), PCRE2_ZERO_TERMINATED,
                            PCRE2_UTF | PCRE2_UCP | PCRE2_DOLLAR_ENDONLY, &error, &offset,
                            nullptr));
    MatchContext context(pcre2_match_context_create(nullptr));
    if (code == nullptr || context == nullptr) {
      return absl::InternalError(fmt::format("pattern '{}' does not compile: {} at {}", pattern,
                                             EngineMessage(error), offset));
    }
    pcre2_set_match_limit(context.get(), kMatchLimit);
    pcre2_set_heap_limit(context.get(), kHeapLimitKib);
    return std::unique_ptr<Pattern>(new Pattern(std::move(code), std::move(context)));
  }

  // Appends the words of `text`, which must be valid UTF-8, to `words`.
  absl::Status Split(std::string_view text, pcre2_match_data* data,
                     std::vector<std::string_view>* words) const {
    const PCRE2_SIZE* match = pcre2_get_ovector_pointer(data);
    size_t pos = 0;
    while (pos < text.size()) {
      const int rc = pcre2_match(code_.get(), reinterpret_cast<PCRE2_SPTR>(text.data()),
                                 text.size(), pos, PCRE2_NO_UTF_CHECK, data, context_.get());
      if (rc == PCRE2_ERROR_NOMATCH) break;
      if (rc < 0) {
        return absl::InternalError(
            fmt::format("cutting the text into words failed at byte {} of {}: {}; shorten the text",
                        pos, text.size(), EngineMessage(rc)));
      }
      const size_t begin = match[0];
      const size_t end = match[1];
      if (begin > pos) words->push_back(text.substr(pos, begin - pos));
      words->push_back(text.substr(begin, end - begin));  // no pattern matches nothing
      pos = end;
    }
    if (pos < text.size()) words->push_back(text.substr(pos));
    return absl::OkStatus();
  }

 private:
  Pattern(Code code, MatchContext context) : code_(std::move(code)), context_(std::move(context)) {}
  const Code code_;
  const MatchContext context_;
};

PreTokenizer::PreTokenizer(std::vector<std::unique_ptr<Pattern>> patterns, bool whole_words,
                           bool adds_bos)
    : patterns_(std::move(patterns)), whole_words_(whole_words), adds_bos_(adds_bos) {}

PreTokenizer::~PreTokenizer() = default;

absl::StatusOr<std::unique_ptr<const PreTokenizer>> PreTokenizer::Create(std::string_view name) {
  for (const Recipe& recipe : Recipes()) {
    if (std::find(recipe.names.begin(), recipe.names.end(), name) == recipe.names.end()) continue;
    std::vector<std::unique_ptr<Pattern>> patterns;
    for (const char* pattern : recipe.patterns) {
      STAGECOACH_ASSIGN_OR_RETURN(patterns.emplace_back(), Pattern::Compile(pattern));
    }
    return std::unique_ptr<const PreTokenizer>(
        new PreTokenizer(std::move(patterns), recipe.whole_words, recipe.adds_bos));
  }
  return MakeModelError(
      ModelError::kUnsupported,
      fmt::format(
          "pre-tokeniser '{}' (key tokenizer.ggml.pre) is not supported; those that are: {}", name,
          SupportedNames()));
}

absl::StatusOr<std::vector<std::string_view>> PreTokenizer::Split(std::string_view text) const {
  const MatchData data(pcre2_match_data_create(1, nullptr));
  if (data == nullptr) return absl::InternalError("out of memory for the pattern engine");
  std::vector<std::string_view> words;
  const auto split_valid = [&](std::string_view valid) -> absl::Status {
    std::vector<std::string_view> coarse = {valid};
    for (const std::unique_ptr<Pattern>& pattern : patterns_) {
      std::vector<std::string_view> fine;
      for (const std::string_view word : coarse) {
        STAGECOACH_RETURN_IF_ERROR(pattern->Split(word, data.get(), &fine));
      }
      coarse = std::move(fine);
    }
    words.insert(words.end(), coarse.begin(), coarse.end());
    return absl::OkStatus();
  };
  while (!text.empty()) {
    const size_t valid = ValidUtf8Prefix(text);
    if (valid > 0) STAGECOACH_RETURN_IF_ERROR(split_valid(text.substr(0, valid)));
    text.remove_prefix(valid);
    size_t invalid = 0;
    while (invalid < text.size()) {
      const Utf8Character character = FirstUtf8Character(text.substr(invalid));
      if (character.status == Utf8Status::kValid) break;
      invalid += character.length;
    }
    if (invalid > 0) words.push_back(text.substr(0, invalid));
    text.remove_prefix(invalid);
  }
  return words;
}

}  // namespace stagecoach
