/*
 * Makes a system call of a process fail: loaded into it by LD_PRELOAD, it counts every call that reaches the disk, over
 * all threads, and does something to one of them. (strace counts for each thread, and sled writes from many.)
 *
 * FAIL_CALLS  names, each with a comma behind it; "open," means those that may make a file
 * FAIL_AT     number of the first call that fails, from 1
 * FAIL_COUNT  how many fail; 0: all from there on
 * FAIL_HOW    kill (before the call), torn (after half of a write), eio, enospc, lie (not done, no error), slow (2 s)
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static atomic_long seen;

static long number(const char *name)
{
    const char *value = getenv(name);
    return value ? atol(value) : 0;
}

static int is(const char *how)
{
    const char *wanted = getenv("FAIL_HOW");
    return wanted && strcmp(wanted, how) == 0;
}

static void die(void)
{
    kill(getpid(), SIGKILL);
    for (;;)
        pause();
}

/* 0: the call is to be done. 1: not, and errno says why it failed. 2: not, and it is to be said that it was. */
static int fate(const char *call)
{
    const char *calls = getenv("FAIL_CALLS");
    const char *found = calls ? strstr(calls, call) : NULL;
    long at = number("FAIL_AT"), count = number("FAIL_COUNT"), now;

    if (!found || found[strlen(call)] != ',' || (found != calls && found[-1] != ','))
        return 0;
    now = atomic_fetch_add(&seen, 1) + 1;
    if (now < at || (count != 0 && now >= at + count))
        return 0;
    if (is("kill"))
        die();
    if (is("slow")) {
        sleep(2);
        return 0;
    }
    if (is("torn"))
        return 3;
    if (is("lie"))
        return 2;
    errno = is("enospc") ? ENOSPC : EIO;
    return 1;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

#define WRAP(name, params, args)                 \
    int name params                              \
    {                                            \
        int what = fate(#name);                  \
        if (what == 3)                           \
            die();                               \
        return what ? what - 2 : REAL(name) args; \
    }

WRAP(fsync, (int fd), (fd))
WRAP(fdatasync, (int fd), (fd))
WRAP(sync_file_range, (int fd, off64_t at, off64_t length, unsigned flags), (fd, at, length, flags))
WRAP(ftruncate64, (int fd, off64_t length), (fd, length))
WRAP(rename, (const char *from, const char *to), (from, to))
WRAP(unlink, (const char *path), (path))
WRAP(mkdir, (const char *path, mode_t mode), (path, mode))
WRAP(chmod, (const char *path, mode_t mode), (path, mode))

ssize_t pwrite64(int fd, const void *bytes, size_t length, off64_t at)
{
    int what = fate("pwrite64");
    if (what == 3) {
        REAL(pwrite64)(fd, bytes, length / 2, at);
        die();
    }
    if (what)
        return what == 2 ? (ssize_t)length : -1;
    return REAL(pwrite64)(fd, bytes, length, at);
}

ssize_t write(int fd, const void *bytes, size_t length)
{
    /* What a test says is not what it writes to a disk. */
    int what = fd > 2 ? fate("write") : 0;
    if (what == 3) {
        REAL(write)(fd, bytes, length / 2);
        die();
    }
    if (what)
        return what == 2 ? (ssize_t)length : -1;
    return REAL(write)(fd, bytes, length);
}

int open64(const char *path, int flags, ...)
{
    mode_t mode = 0;
    if (flags & O_CREAT) {
        va_list rest;
        va_start(rest, flags);
        mode = va_arg(rest, mode_t);
        va_end(rest);
        int what = fate("open");
        if (what == 3)
            die();
        if (what == 1)
            return -1;
    }
    return REAL(open64)(path, flags, mode);
}
