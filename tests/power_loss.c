/* Preloaded into a process, writes down in order everything it does to the files below a folder: what it creates, names,
 * writes and syncs. From that log, test_power_loss.py makes the disk as a power loss at any moment may leave it.
 *
 *     POWER_LOSS_ROOT   the folder, as realpath has it
 *     POWER_LOSS_LOG    the log, outside of it
 *     POWER_LOSS_AT     the process dies instead of doing operation number so many (from 0)
 *     POWER_LOSS_FULL   every data operation from that number on fails: the disk is full
 *     POWER_LOSS_DELAY  each data operation takes so many milliseconds more
 *
 * A line for each operation, then the bytes it speaks of. Files are inode numbers, and none is used twice: whatever loses
 * its name stays open. One lock is held around operation and log, so their orders agree. Syncs are only written down. */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static long operations = 0;
static int output = -1;

static long number(const char *name) {
    const char *value = getenv(name);
    return value ? atol(value) : -1;
}

static int below(const char *path) {
    const char *root = getenv("POWER_LOSS_ROOT");
    size_t length = root ? strlen(root) : 0;
    return length && !strncmp(path, root, length) && (path[length] == '/' || !path[length]);
}

/* Whether an open file is one that counts. */
static int watched(int file) {
    char link[64], path[PATH_MAX];
    struct stat found;
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0)
        return 0;
    path[length] = 0;
    return below(path) && !fstat(file, &found) && (S_ISREG(found.st_mode) || S_ISDIR(found.st_mode));
}

/* The inode of the folder that a name lies in, and the name itself; 0 where it does not count. */
static ino_t parent(int folder, const char *path, char *name) {
    char full[PATH_MAX * 2], real[PATH_MAX], link[64];
    struct stat found;
    full[0] = 0;
    if (path[0] != '/') {
        snprintf(link, sizeof link, folder == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", folder);
        ssize_t length = readlink(link, full, PATH_MAX);
        if (length < 0)
            return 0;
        strcpy(full + length, "/");
    }
    strncat(full, path, PATH_MAX - 1);
    char *slash = strrchr(full, '/');
    strncpy(name, slash + 1, NAME_MAX);
    slash[slash == full] = 0;
    return realpath(full, real) && below(real) && !stat(real, &found) ? found.st_ino : 0;
}

static void put(const void *data, size_t length) {
    if (output < 0)
        output = syscall(SYS_openat, AT_FDCWD, getenv("POWER_LOSS_LOG"), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    while (length) {
        ssize_t done = syscall(SYS_write, output, data, length);
        if (done <= 0)
            abort();
        data = (const char *)data + done, length -= done;
    }
}

__attribute__((format(printf, 1, 2))) static void note(const char *format, ...) {
    char line[PATH_MAX * 2];
    va_list values;
    va_start(values, format);
    int length = vsnprintf(line, sizeof line, format, values);
    va_end(values);
    put(line, length);
}

/* Begin an operation: count it, and die here if it is the one. */
static void begin(void) {
    pthread_mutex_lock(&lock);
    if (operations++ == number("POWER_LOSS_AT"))
        syscall(SYS_kill, getpid(), SIGKILL);
}

static void end(void) {
    int saved = errno;
    pthread_mutex_unlock(&lock);
    errno = saved;
}

/* Begin an operation that takes space; whether there is any. */
static int begin_data(void) {
    long delay = number("POWER_LOSS_DELAY"), full = number("POWER_LOSS_FULL");
    struct timespec pause = {delay / 1000, delay % 1000 * 1000000};
    if (delay > 0)
        nanosleep(&pause, NULL);
    begin();
    errno = ENOSPC;
    return full < 0 || operations <= full;
}

static ino_t inode(int file) {
    struct stat found;
    return fstat(file, &found) ? 0 : found.st_ino;
}

static void wrote(int file, off_t offset, ssize_t length) {
    char path[64], *data = malloc(length > 0 ? length : 1);
    if (length <= 0)
        return free(data);
    snprintf(path, sizeof path, "/proc/self/fd/%d", file);
    int again = syscall(SYS_openat, AT_FDCWD, path, O_RDONLY | O_CLOEXEC, 0);
    if (again < 0 || pread(again, data, length, offset) != length)
        abort();
    close(again);
    note("write %lu %ld %zd\n", inode(file), (long)offset, length);
    put(data, length);
    free(data);
}

static off_t position(int file) {
    struct stat found;
    if (fcntl(file, F_GETFL) & O_APPEND)
        return fstat(file, &found) ? 0 : found.st_size;
    return lseek(file, 0, SEEK_CUR);
}

ssize_t write(int file, const void *data, size_t length) {
    if (!watched(file))
        return syscall(SYS_write, file, data, length);
    int room = begin_data();
    off_t offset = position(file);
    ssize_t done = room ? syscall(SYS_write, file, data, length) : -1;
    wrote(file, offset, done);
    return end(), done;
}

ssize_t pwrite64(int file, const void *data, size_t length, off64_t offset) {
    if (!watched(file))
        return syscall(SYS_pwrite64, file, data, length, offset);
    ssize_t done = begin_data() ? syscall(SYS_pwrite64, file, data, length, offset) : -1;
    wrote(file, offset, done);
    return end(), done;
}

ssize_t pwritev64v2(int file, const struct iovec *parts, int count, off64_t offset, int flags) {
    if (!watched(file))
        return syscall(SYS_pwritev2, file, parts, count, offset, 0L, flags);
    ssize_t done = begin_data() ? syscall(SYS_pwritev2, file, parts, count, offset, 0L, flags) : -1;
    wrote(file, offset, done);
    return end(), done;
}

ssize_t copy_file_range(int from, off64_t *at, int to, off64_t *offset, size_t length, unsigned flags) {
    if (!watched(to))
        return syscall(SYS_copy_file_range, from, at, to, offset, length, flags);
    int room = begin_data();
    off_t start = offset ? *offset : position(to);
    ssize_t done = room ? syscall(SYS_copy_file_range, from, at, to, offset, length, flags) : -1;
    wrote(to, start, done);
    return end(), done;
}

ssize_t sendfile64(int to, int from, off64_t *at, size_t length) {
    if (!watched(to))
        return syscall(SYS_sendfile, to, from, at, length);
    int room = begin_data();
    off_t start = position(to);
    ssize_t done = room ? syscall(SYS_sendfile, to, from, at, length) : -1;
    wrote(to, start, done);
    return end(), done;
}

int ftruncate64(int file, off64_t size) {
    if (!watched(file))
        return syscall(SYS_ftruncate, file, size);
    begin();
    int failed = syscall(SYS_ftruncate, file, size);
    if (!failed)
        note("truncate %lu %ld\n", inode(file), (long)size);
    return end(), failed;
}

int posix_fallocate64(int file, off64_t offset, off64_t length) {
    if (!watched(file))
        return syscall(SYS_fallocate, file, 0, offset, length) ? errno : 0;
    int failed = begin_data() ? syscall(SYS_fallocate, file, 0, offset, length) : -1;
    failed = failed ? errno : 0;
    if (!failed)
        note("extend %lu %ld\n", inode(file), (long)(offset + length));
    return end(), failed;
}

static int opened(int folder, const char *path, int flags, mode_t mode) {
    char name[NAME_MAX + 1] = "";
    struct stat found;
    ino_t place = flags & (O_CREAT | O_TRUNC) ? parent(folder, path, name) : 0;
    if (!place)
        return syscall(SYS_openat, folder, path, flags, mode);
    begin();
    int existed = !fstatat(folder, path, &found, 0);
    int file = syscall(SYS_openat, folder, path, flags, mode);
    if (file >= 0 && !existed)
        note("create %lu %lu file %zu\n%s", place, inode(file), strlen(name), name);
    else if (file >= 0 && flags & O_TRUNC)
        note("truncate %lu 0\n", inode(file));
    return end(), file;
}

#define MODE(flags) \
    va_list values; \
    va_start(values, flags); \
    mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(values, mode_t) : 0; \
    va_end(values)

int open64(const char *path, int flags, ...) {
    MODE(flags);
    return opened(AT_FDCWD, path, flags, mode);
}

int openat64(int folder, const char *path, int flags, ...) {
    MODE(flags);
    return opened(folder, path, flags, mode);
}

int mkdirat(int folder, const char *path, mode_t mode) {
    char name[NAME_MAX + 1] = "";
    struct stat found;
    ino_t place = parent(folder, path, name);
    if (!place)
        return syscall(SYS_mkdirat, folder, path, mode);
    begin();
    int failed = syscall(SYS_mkdirat, folder, path, mode);
    if (!failed && !fstatat(folder, path, &found, 0))
        note("create %lu %lu folder %zu\n%s", place, found.st_ino, strlen(name), name);
    return end(), failed;
}

int unlinkat(int folder, const char *path, int flags) {
    char name[NAME_MAX + 1] = "";
    ino_t place = parent(folder, path, name);
    if (!place)
        return syscall(SYS_unlinkat, folder, path, flags);
    begin();
    syscall(SYS_openat, folder, path, O_PATH | O_NOFOLLOW | O_CLOEXEC, 0); /* keeps its inode number */
    int failed = syscall(SYS_unlinkat, folder, path, flags);
    if (!failed)
        note("unlink %lu %zu\n%s", place, strlen(name), name);
    return end(), failed;
}

int renameat2(int from, const char *old, int to, const char *path, unsigned flags) {
    char before[NAME_MAX + 1] = "", after[NAME_MAX + 1] = "";
    ino_t source = parent(from, old, before), target = parent(to, path, after);
    if (!source || !target)
        return syscall(SYS_renameat2, from, old, to, path, flags);
    begin();
    syscall(SYS_openat, to, path, O_PATH | O_NOFOLLOW | O_CLOEXEC, 0);
    int failed = syscall(SYS_renameat2, from, old, to, path, flags);
    if (!failed)
        note("rename %lu %lu %zu %zu\n%s%s", source, target, strlen(before), strlen(after), before, after);
    return end(), failed;
}

int fsync(int file) {
    if (!watched(file))
        return syscall(SYS_fsync, file);
    begin();
    note("sync %lu\n", inode(file));
    return end(), 0;
}

/* The same under their other names. */
int fdatasync(int file) { return watched(file) ? fsync(file) : (int)syscall(SYS_fdatasync, file); }
ssize_t pwrite(int f, const void *d, size_t n, off_t at) { return pwrite64(f, d, n, at); }
ssize_t pwritev2(int f, const struct iovec *p, int n, off_t at, int flags) { return pwritev64v2(f, p, n, at, flags); }
ssize_t sendfile(int to, int from, off_t *at, size_t n) { return sendfile64(to, from, (off64_t *)at, n); }
int fallocate64(int file, int mode, off64_t offset, off64_t length) {
    int failed = mode ? syscall(SYS_fallocate, file, mode, offset, length) : posix_fallocate64(file, offset, length);
    return failed > 0 ? (errno = failed, -1) : failed;
}

int ftruncate(int file, off_t size) { return ftruncate64(file, size); }
int fallocate(int file, int mode, off_t at, off_t n) { return fallocate64(file, mode, at, n); }
int posix_fallocate(int file, off_t at, off_t n) { return posix_fallocate64(file, at, n); }
int open(const char *path, int flags, ...) { MODE(flags); return opened(AT_FDCWD, path, flags, mode); }
int openat(int folder, const char *path, int flags, ...) { MODE(flags); return opened(folder, path, flags, mode); }
int mkdir(const char *path, mode_t mode) { return mkdirat(AT_FDCWD, path, mode); }
int unlink(const char *path) { return unlinkat(AT_FDCWD, path, 0); }
int rmdir(const char *path) { return unlinkat(AT_FDCWD, path, AT_REMOVEDIR); }
int renameat(int from, const char *old, int to, const char *path) { return renameat2(from, old, to, path, 0); }
int rename(const char *old, const char *path) { return renameat2(AT_FDCWD, old, AT_FDCWD, path, 0); }
