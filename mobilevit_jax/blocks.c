/* Large blocks of memory that stay with the process when they are given back.

XLA asks for one block for everything that a train step computes on the way, gigabytes, and gives it
back after each step; the C library returns it to the system, which clears every page of the next
one: on a busy host a third of a step's time. Loaded ahead of the C library (LD_PRELOAD, launch.py),
this keeps such a block for the next request that it fits. What others ask for by malloc is not
touched. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <malloc.h>
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>

#define LARGE ((size_t)32 << 20) /* what glibc, too, asks the system for each time */
#define PAGE ((size_t)2 << 20)   /* a huge page: blocks begin at one */
#define MOST 64                  /* blocks at a time; others are the C library's */

void *__libc_memalign(size_t alignment, size_t size);
void __libc_free(void *pointer);
void *__libc_realloc(void *pointer, size_t size);

static struct {
  char *data;
  size_t size;
  int used;
} blocks[MOST];
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;

static int find(void *pointer) {
  for (int i = 0; i < MOST; ++i)
    if (blocks[i].data == pointer) return i;
  return -1;
}

static void forget(int i) {
  munmap(blocks[i].data, blocks[i].size);
  memset(&blocks[i], 0, sizeof blocks[i]);
}

/* A block of whole huge pages; NULL where there is none to be had. */
static void *take(size_t size) {
  char *data = NULL;
  size = (size + PAGE - 1) / PAGE * PAGE;
  pthread_mutex_lock(&mutex);
  int best = -1;
  for (int i = 0; i < MOST; ++i) /* one far too large would be kept from what needs it */
    if (blocks[i].data && !blocks[i].used && blocks[i].size >= size && blocks[i].size / 2 <= size &&
        (best < 0 || blocks[i].size < blocks[best].size))
      best = i;
  if (best >= 0) {
    blocks[best].used = 1;
    data = blocks[best].data;
  } else {
    /* Nothing is kept beside a new block: a process never has more than it asks for at a time. */
    for (int i = 0; i < MOST; ++i)
      if (blocks[i].data && !blocks[i].used) forget(i);
    const int i = find(NULL);
    char *all = i < 0 ? MAP_FAILED
                      : mmap(NULL, size + PAGE, PROT_READ | PROT_WRITE,
                             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (all != MAP_FAILED) {
      data = (char *)(((uintptr_t)all + PAGE - 1) / PAGE * PAGE);
      if (data != all) munmap(all, data - all);
      if (data + size != all + size + PAGE) munmap(data + size, all + PAGE - data);
      madvise(data, size, MADV_HUGEPAGE);
      blocks[i].data = data;
      blocks[i].size = size;
      blocks[i].used = 1;
    }
  }
  pthread_mutex_unlock(&mutex);
  return data;
}

/* The size of a block of ours in use, 0 for another one. Called for all that is freed: nearly none
of it begins at a huge page. */
static size_t size_of(void *pointer) {
  if (!pointer || (uintptr_t)pointer % PAGE) return 0;
  pthread_mutex_lock(&mutex);
  const int i = find(pointer);
  const size_t size = i < 0 ? 0 : blocks[i].size;
  pthread_mutex_unlock(&mutex);
  return size;
}

int posix_memalign(void **result, size_t alignment, size_t size) {
  if (alignment % sizeof(void *) || alignment & (alignment - 1) || !alignment) return EINVAL;
  void *data = size >= LARGE && alignment <= PAGE ? take(size) : NULL;
  if (!data) data = __libc_memalign(alignment, size);
  if (!data) return ENOMEM;
  *result = data;
  return 0;
}

void *aligned_alloc(size_t alignment, size_t size) {
  void *data = size >= LARGE && alignment <= PAGE ? take(size) : NULL;
  return data ? data : __libc_memalign(alignment, size);
}

void free(void *pointer) {
  if (!size_of(pointer)) {
    __libc_free(pointer);
    return;
  }
  pthread_mutex_lock(&mutex);
  const int i = find(pointer);
  if (i >= 0) blocks[i].used = 0;
  pthread_mutex_unlock(&mutex);
}

size_t malloc_usable_size(void *pointer) {
  static size_t (*others)(void *);
  const size_t size = size_of(pointer);
  if (size) return size;
  if (!others) *(void **)&others = dlsym(RTLD_NEXT, "malloc_usable_size");
  return others(pointer);
}

void *realloc(void *pointer, size_t size) {
  const size_t old = size_of(pointer);
  if (!old) return __libc_realloc(pointer, size);
  void *data = __libc_memalign(64, size);
  if (data) {
    memcpy(data, pointer, old < size ? old : size);
    free(pointer);
  }
  return data;
}
