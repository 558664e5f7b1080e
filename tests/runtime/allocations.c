// Counts what a process allocates, for a test that loads it first (LD_PRELOAD): every call passes through to the C library.
#include <stddef.h>

void* __libc_malloc(size_t);
void* __libc_calloc(size_t, size_t);
void* __libc_realloc(void*, size_t);
void* __libc_memalign(size_t, size_t);

static long calls, bytes;

static void count(size_t size) {
    __atomic_add_fetch(&calls, 1, __ATOMIC_RELAXED);
    __atomic_add_fetch(&bytes, size, __ATOMIC_RELAXED);
}

long allocation_calls(void) { return __atomic_load_n(&calls, __ATOMIC_RELAXED); }
long allocation_bytes(void) { return __atomic_load_n(&bytes, __ATOMIC_RELAXED); }

void* malloc(size_t size) { return count(size), __libc_malloc(size); }
void* calloc(size_t number, size_t size) { return count(number * size), __libc_calloc(number, size); }
void* realloc(void* old, size_t size) { return count(size), __libc_realloc(old, size); }
void* memalign(size_t alignment, size_t size) { return count(size), __libc_memalign(alignment, size); }
void* aligned_alloc(size_t alignment, size_t size) { return memalign(alignment, size); }
int posix_memalign(void** made, size_t alignment, size_t size) { return (*made = memalign(alignment, size)) ? 0 : 12; }
