// The versions whose executables this runner reads; TVM promises no stable format between them.
#pragma once

#include <string>

namespace amx {

inline const std::string kTvmVersion = AMX_TVM_VERSION;
inline const std::string kFfiVersion = AMX_FFI_VERSION;

}  // namespace amx
