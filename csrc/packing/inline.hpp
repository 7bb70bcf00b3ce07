// Functions that must be inlined: into a caller's instruction set, or for its constants.
#pragma once

#if defined(__GNUC__)
#define SFT_FAST_INLINE __attribute__((always_inline)) inline
#else
#define SFT_FAST_INLINE inline
#endif
