/* Loads indexcache at run time: one dlopen, one dlsym, then the function table of indexcache.h.
 *
 *   idxc_library library;
 *   const idxc_api *api = idxc_library_open(&library, "/opt/x/lib/libindexcache.so.0");
 *   if (!api) { fprintf(stderr, "%s\n", library.error); return 1; }
 *   api->idxc_context_create(NULL, &context);
 *   ...
 *   idxc_library_close(&library);
 *
 * C99 and C++11, header-only, POSIX only (glibc before 2.34: link with -ldl). The program needs no symbol of the
 * library at link time. C++17: indexcache.hpp works over the table, see INDEXCACHE_TABLE there. */

#ifndef INDEXCACHE_DYNLOAD_H
#define INDEXCACHE_DYNLOAD_H

#include "indexcache.h"

#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

/* A null pointer as each language spells it: C++ compilers can be told to warn of NULL. */
#ifdef __cplusplus
#define IDXC_NULL nullptr
#else
#define IDXC_NULL NULL
#endif

/** Bytes of the function table that the host cannot do without: all that this header knows. A host that is content
 * with an older library defines it, before including this file, as the offset of the first function it does not need,
 * and checks `struct_size` before it calls a later one. */
#ifndef IDXC_TABLE_SIZE_NEEDED
#define IDXC_TABLE_SIZE_NEEDED sizeof(idxc_api)
#endif

/** A loaded library. */
typedef struct idxc_library {
  /** What dlopen gave; NULL when closed. */
  void *handle;
  /** The function table; NULL when closed. */
  const idxc_api *api;
  /** Why `idxc_library_open` failed; empty if it did not. */
  char error[512];
} idxc_library;

/** Closes the library. All handles must have been destroyed before. The code stays mapped (the library is linked
 * `-z nodelete`), so threads that have called it may exit later. Closing twice, or after a failed open, is fine. */
static inline void idxc_library_close(idxc_library *library) {
  if (library->handle) dlclose(library->handle);
  library->handle = IDXC_NULL;
  library->api = IDXC_NULL;
}

/** Opens the library at `path` (as dlopen takes it) and returns its function table, which is valid until the library is
 * closed. NULL on failure, with the reason in `library->error`. Any thread, each with its own `idxc_library`. */
static inline const idxc_api *idxc_library_open(idxc_library *library, const char *path) {
  const idxc_api *(*get_api)(uint32_t) = IDXC_NULL;
  const idxc_api *api;
  void *symbol;
  memset(library, 0, sizeof(*library));
  if (!path) { /* dlopen would open the program itself. */
    snprintf(library->error, sizeof(library->error), "path: expected a library's path, got NULL");
    return IDXC_NULL;
  }
  library->handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (!library->handle) {
    const char *reason = dlerror();
    snprintf(library->error, sizeof(library->error), "%s", reason ? reason : "dlopen failed");
    return IDXC_NULL;
  }
  symbol = dlsym(library->handle, "idxc_get_api");
  if (!symbol) {
    snprintf(library->error, sizeof(library->error), "%s: not indexcache: no symbol idxc_get_api", path);
    idxc_library_close(library);
    return IDXC_NULL;
  }
  memcpy(&get_api, &symbol, sizeof(get_api)); /* C has no cast from void* to a function. */
  api = get_api(IDXC_ABI_VERSION);
  if (!api) {
    const idxc_api *first = get_api(1);
    const unsigned version = first ? first->version : 0, needed = IDXC_ABI_VERSION;
    snprintf(library->error, sizeof(library->error), "%s: ABI version %u, needed at least %u", path, version, needed);
    idxc_library_close(library);
    return IDXC_NULL;
  }
  if (api->struct_size < IDXC_TABLE_SIZE_NEEDED) {
    const unsigned size = api->struct_size, needed = IDXC_TABLE_SIZE_NEEDED;
    snprintf(library->error, sizeof(library->error), "%s: function table of %u bytes, needed at least %u", path, size,
             needed);
    idxc_library_close(library);
    return IDXC_NULL;
  }
  library->api = api;
  return api;
}

#endif /* INDEXCACHE_DYNLOAD_H */
