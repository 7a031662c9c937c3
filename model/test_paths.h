// Where test programs find their data and the binaries they drive. Both are known from the build;
// environment variables of the same names say where they are on another machine (./dev bundle).
#ifndef STAGECOACH_MODEL_TEST_PATHS_H_
#define STAGECOACH_MODEL_TEST_PATHS_H_

#include <cstdlib>
#include <string>

namespace stagecoach {

// tests/data/<name>.
inline std::string TestDataPath(const std::string& name) {
  const char* const moved = std::getenv("STAGECOACH_SOURCE_DIR");
  return std::string(moved != nullptr ? moved : STAGECOACH_SOURCE_DIR) + "/tests/data/" + name;
}

// The folder of stagecoach, stagecoach-coordinator and stagecoach-worker.
inline std::string TestBinaryDir() {
  const char* const moved = std::getenv("STAGECOACH_BIN_DIR");
  return moved != nullptr ? moved : STAGECOACH_BIN_DIR;
}

}  // namespace stagecoach

#endif  // STAGECOACH_MODEL_TEST_PATHS_H_
