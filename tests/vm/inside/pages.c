/* Maps hugepages and says where they are: pages SHIFT COUNT. Then it asks for one more, which must be refused by mmap
 * and not by SIGBUS at the first touch. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

static char *map(int shift, long pages)
{
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB | (shift << 26 /* MAP_HUGE_SHIFT */);
    return mmap(NULL, (size_t)pages << shift, PROT_READ | PROT_WRITE, flags, -1, 0);
}

static void touch(char *start, int shift, long pages)
{
    for (long page = 0; page < pages; page++)
        start[(size_t)page << shift] = 1;
}

static void show(void)
{
    char line[4096];
    FILE *maps = fopen("/proc/self/numa_maps", "r");
    while (maps && fgets(line, sizeof line, maps))
        if (strstr(line, " huge "))
            printf("MAP=%s", line);
}

int main(int count, char **words)
{
    int shift = atoi(words[1]);
    long pages = atol(words[2]);
    char *start = map(shift, pages);
    if (count != 3 || start == MAP_FAILED) {
        printf("FAILED=%s\n", strerror(errno));
        return 1;
    }
    touch(start, shift, pages);
    show();
    char *more = map(shift, 1);
    if (more != MAP_FAILED)
        touch(more, shift, 1);
    printf("OVER=%s\n", more == MAP_FAILED ? strerror(errno) : "mapped");
    return 0;
}
