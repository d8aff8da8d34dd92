// The part of docs/search.md's C++ program that is the reader's: a loss for each pattern. Kills itself at the call that
// KILL_AT counts to.
#include <indexcache/indexcache.h>

#include <csignal>
#include <cstdlib>
#include <cstring>

double mean_loss(const idxc_search_candidate& candidate) {
  static int calls = 0;
  const char* kill_at = std::getenv("KILL_AT");
  if (kill_at && ++calls == std::atoi(kill_at)) std::raise(SIGKILL);
  // What Shared layers cost, the more the longer they have reused a selection.
  int age = 0, total = 0;
  for (int layer = 0; candidate.pattern[layer]; ++layer) {
    age = candidate.pattern[layer] == 'F' ? 0 : age + 1;
    total += age * (1 + layer * 7 % 13);
  }
  return 2.0 + total / 1024.0;
}
