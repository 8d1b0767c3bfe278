/* Loaded before libc: makes fsync slow, so that a process can be caught in the midst of writing a
   checkpoint (KNL_TEST_FSYNC_MS), and sets the clock on the wall back by a day once a file is there
   (KNL_TEST_CLOCK_FILE). */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

int fsync(int file) {
    static int (*real)(int);
    const char* slow = getenv("KNL_TEST_FSYNC_MS");
    if (!real) real = (int (*)(int))dlsym(RTLD_NEXT, "fsync");
    if (slow) usleep(1000 * atoi(slow));
    return real(file);
}

static long set_back(void) {
    const char* file = getenv("KNL_TEST_CLOCK_FILE");
    return file && access(file, F_OK) == 0 ? 86400 : 0;
}

int clock_gettime(clockid_t clock, struct timespec* now) {
    static int (*real)(clockid_t, struct timespec*);
    if (!real) real = (int (*)(clockid_t, struct timespec*))dlsym(RTLD_NEXT, "clock_gettime");
    int result = real(clock, now);
    if (clock == CLOCK_REALTIME) now->tv_sec -= set_back();
    return result;
}

time_t time(time_t* out) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (out) *out = now.tv_sec;
    return now.tv_sec;
}

int gettimeofday(struct timeval* now, void* zone) {
    struct timespec precise;
    (void)zone;
    clock_gettime(CLOCK_REALTIME, &precise);
    now->tv_sec = precise.tv_sec;
    now->tv_usec = precise.tv_nsec / 1000;
    return 0;
}
