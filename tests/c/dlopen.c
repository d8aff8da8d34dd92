/* The loader's life: many cycles, threads that exit after the close, libraries that are none or too old.
 * Arguments: the library, a library of the first ABI with a short table, one that serves no version at all. */
#define _POSIX_C_SOURCE 200809L
#include <indexcache/dynload.h>

#include <pthread.h>
#include <stdlib.h>

#define NEED(condition)                                                     \
  do {                                                                      \
    if (!(condition)) {                                                     \
      fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);       \
      exit(1);                                                              \
    }                                                                       \
  } while (0)

enum { THREADS = 4 };

static const idxc_api *api;
static pthread_barrier_t used, closed;

static void *worker(void *unused) {
  idxc_plan *plan = NULL;
  idxc_model_desc model = IDXC_MODEL_DESC_INIT;
  /* An error text and a quiet panic hook: thread-local state with destructors. */
  NEED(api->idxc_plan_from_pattern(&model, "?", &plan) != IDXC_OK);
  NEED(api->idxc_last_error()[0] != '\0');
  pthread_barrier_wait(&used);
  pthread_barrier_wait(&closed);
  return unused;
}

static void refuses(const char *path, const char *word) {
  idxc_library library;
  NEED(idxc_library_open(&library, path) == NULL);
  NEED(library.handle == NULL && library.api == NULL);
  if (!strstr(library.error, word)) {
    fprintf(stderr, "expected \"%s\" in \"%s\"\n", word, library.error);
    exit(1);
  }
  idxc_library_close(&library);
}

int main(int argc, char **argv) {
  idxc_library library, second;
  pthread_t threads[THREADS];
  int i;
  NEED(argc == 4);

  for (i = 0; i < 50; ++i) {
    idxc_context *context = NULL;
    idxc_context_desc desc = IDXC_CONTEXT_DESC_INIT;
    desc.threads = 2;
    api = idxc_library_open(&library, argv[1]);
    if (!api) return fprintf(stderr, "%s\n", library.error), 1;
    NEED(api->idxc_context_create(&desc, &context) == IDXC_OK);
    api->idxc_context_destroy(context); /* its threads may still be on their way out */
    idxc_library_close(&library);
  }

  NEED(pthread_barrier_init(&used, NULL, THREADS + 1) == 0 && pthread_barrier_init(&closed, NULL, THREADS + 1) == 0);
  api = idxc_library_open(&library, argv[1]);
  NEED(api != NULL && idxc_library_open(&second, argv[1]) == api);
  for (i = 0; i < THREADS; ++i) NEED(pthread_create(&threads[i], NULL, worker, NULL) == 0);
  pthread_barrier_wait(&used);
  idxc_library_close(&second);
  idxc_library_close(&library);
  pthread_barrier_wait(&closed);
  for (i = 0; i < THREADS; ++i) NEED(pthread_join(threads[i], NULL) == 0);

  refuses("/nonexistent/libindexcache.so", "/nonexistent/libindexcache.so");
  refuses(NULL, "path");
  refuses("libc.so.6", "no symbol idxc_get_api");
  refuses(argv[2], "function table of 16 bytes");
  refuses(argv[3], "ABI version 0");
  return 0;
}
