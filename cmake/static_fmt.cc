// What fmt's headers leave to its library, for STAGECOACH_STATIC: Debian has no archive of fmt.
#include <fmt/format-inl.h>

FMT_BEGIN_NAMESPACE
namespace detail {

template FMT_API locale_ref::locale_ref(const std::locale& locale);
template FMT_API std::locale locale_ref::get<std::locale>() const;
template FMT_API thousands_sep_result<char> thousands_sep_impl(locale_ref);
template FMT_API char decimal_point_impl(locale_ref);
template FMT_API void buffer<char>::append(const char*, const char*);

namespace dragonbox {
template FMT_API decimal_fp<float> to_decimal(float) noexcept;
template FMT_API decimal_fp<double> to_decimal(double) noexcept;
}  // namespace dragonbox

}  // namespace detail
FMT_END_NAMESPACE
