// main() of every test program: gtest's own, but that it ends when the preparation of a suite
// (SetUpTestSuite) fails. gtest would go on and call the suite's tests skipped, and CTest takes
// what is skipped for no failure.
#include <gtest/gtest.h>

#include <cstdio>
#include <cstdlib>
#include <string>

namespace {

class EndOnFailedPreparation : public testing::EmptyTestEventListener {
  void OnTestSuiteStart(const testing::TestSuite& suite) override { suite_ = suite.name(); }
  void OnTestStart(const testing::TestInfo&) override { in_test_ = true; }
  void OnTestEnd(const testing::TestInfo&) override { in_test_ = false; }
  void OnTestSuiteEnd(const testing::TestSuite&) override { suite_.clear(); }
  // May not ask gtest where it is: it holds its mutex.
  void OnTestPartResult(const testing::TestPartResult& result) override {
    if (suite_.empty() || in_test_ || !result.failed()) return;
    std::printf("[  FAILED  ] %s: before its tests, or behind them\n", suite_.c_str());
    std::fflush(nullptr);
    std::_Exit(1);  // threads of the suite may be running
  }

  std::string suite_;  // under way, or empty
  bool in_test_ = false;
};

}  // namespace

int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  testing::UnitTest::GetInstance()->listeners().Append(new EndOnFailedPreparation);
  return RUN_ALL_TESTS();
}
