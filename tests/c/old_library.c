/* A library from before most functions (-DVERSION=1), or one that serves no version that we know (-DVERSION=0). */
#include <indexcache/indexcache.h>

const idxc_api *idxc_get_api(uint32_t version) {
  static const uint32_t table[4] = {16, 1, 0, 0};
  return VERSION && version == 1 ? (const idxc_api *)(const void *)table : NULL;
}
