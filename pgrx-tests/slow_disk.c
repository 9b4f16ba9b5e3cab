/*
 * A disk that takes its time: a library to preload into a server, a receiver or a daemon, whose
 * fsync and fdatasync then last at least as long as the number of microseconds in a file says.
 *
 *     SLOW_DISK=FILE LD_PRELOAD=slow_disk.so postgres -D ...
 *
 * The file holds one 32-bit number in the machine's order, is mapped when the program starts, and
 * may be changed at any time: 0 is the disk as it is, and with the greatest number a flush does not
 * begin until there is another. Time is counted from the call, so a real flush is not added to the
 * pause but is part of it. Only the calling thread sleeps, and it holds nothing that others need:
 * flushes of several threads overlap, as on a disk with a deep queue.
 *
 * Nothing here makes a flush more or less durable. Programs that make the system call themselves,
 * without libc, are not slowed down.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

typedef int flush_call(int fd);

static flush_call *real_fsync, *real_fdatasync;
static const volatile uint32_t *delay_us;

__attribute__((constructor)) static void
begin(void)
{
	const char *path = getenv("SLOW_DISK");
	void	   *mapped;
	int			fd;

	real_fsync = (flush_call *) dlsym(RTLD_NEXT, "fsync");
	real_fdatasync = (flush_call *) dlsym(RTLD_NEXT, "fdatasync");
	if (path == NULL)
		return;
	fd = open(path, O_RDONLY | O_CLOEXEC);
	mapped = mmap(NULL, sizeof(uint32_t), PROT_READ, MAP_SHARED, fd, 0);
	if (fd < 0 || mapped == MAP_FAILED)
	{
		/* Going on as a fast disk would give wrong figures. */
		fprintf(stderr, "slow_disk: could not map %s\n", path);
		abort();
	}
	close(fd);
	delay_us = mapped;
}

/* Do not flush yet. */
#define HELD UINT32_MAX

static void
wait_while_held(void)
{
	const struct timespec pause = {.tv_nsec = 1000000};

	while (delay_us && *delay_us == HELD)
		nanosleep(&pause, NULL);
}

static int
lengthened(flush_call *real, int fd)
{
	uint32_t	us;
	struct timespec until;
	int			result,
				slack,
				saved;

	wait_while_held();
	us = delay_us ? *delay_us : 0;
	if (us == 0 || us == HELD)
		return real(fd);
	clock_gettime(CLOCK_MONOTONIC, &until);
	until.tv_sec += us / 1000000;
	until.tv_nsec += (long) (us % 1000000) * 1000;
	if (until.tv_nsec >= 1000000000)
	{
		until.tv_sec++;
		until.tv_nsec -= 1000000000;
	}
	result = real(fd);
	saved = errno;
	/* By default the kernel may be 50 us late. The program's other sleeps stay as they are. */
	slack = prctl(PR_GET_TIMERSLACK, 0, 0, 0, 0);
	prctl(PR_SET_TIMERSLACK, 1, 0, 0, 0);
	while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, NULL) == EINTR)
		;
	if (slack > 0)
		prctl(PR_SET_TIMERSLACK, slack, 0, 0, 0);
	errno = saved;
	return result;
}

int
fsync(int fd)
{
	return lengthened(real_fsync, fd);
}

int
fdatasync(int fd)
{
	return lengthened(real_fdatasync, fd);
}
