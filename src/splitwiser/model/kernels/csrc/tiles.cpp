// Whether AMX tiles may be used.

#include "tiles.h"

#include "functions.h"

#if HAS_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

// Returns whether the functions were compiled for tiles and the system lets this process use them, which it must request.
extern "C" int may_use_tiles() {
#if HAS_AMX
    constexpr long ASK = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, and the number of the tiles' processor state
    static const bool may = syscall(SYS_arch_prctl, ASK, TILE_DATA) == 0;
    return may;
#else
    return 0;
#endif
}
