/* Threads that are started when first needed, kept, and wait for work without spinning. */

#define _GNU_SOURCE
#include "pool.h"

#include <fenv.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>

enum { MOST_WORKERS = 255 };

/* Held by the caller whom the pool serves. */
static pthread_mutex_t turn = PTHREAD_MUTEX_INITIALIZER;

/* Guards all that follows. */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t work_is_there = PTHREAD_COND_INITIALIZER;
static pthread_cond_t all_are_done = PTHREAD_COND_INITIALIZER;
static int num_workers, num_wanted, num_running;
static bool forks_are_watched;
static struct {
    void (*work)(void *);
    void *argument;
    fenv_t environment; /* whether denormals are flushed, how is rounded */
} task;

static void *serve(void *nothing)
{
    pthread_mutex_lock(&lock);
    for (;;) {
        while (num_wanted == 0) {
            pthread_cond_wait(&work_is_there, &lock);
        }
        num_wanted--;
        num_running++;
        pthread_mutex_unlock(&lock);
        fesetenv(&task.environment);
        task.work(task.argument); /* the caller waits for it, so `task` stays */
        pthread_mutex_lock(&lock);
        if (--num_running == 0) {
            pthread_cond_signal(&all_are_done);
        }
    }
    return nothing;
}

/* A fork waits until the pool is idle, or the child would find it in the middle of a change. */
static void before_fork(void)
{
    pthread_mutex_lock(&turn);
    pthread_mutex_lock(&lock);
}

static void in_parent(void)
{
    pthread_mutex_unlock(&lock);
    pthread_mutex_unlock(&turn);
}

/* Workers are not forked, and the conditions still count them as waiting. */
static void in_child(void)
{
    num_workers = 0;
    pthread_cond_init(&work_is_there, NULL);
    pthread_cond_init(&all_are_done, NULL);
    in_parent();
}

static void hire(int num)
{
    if (!forks_are_watched) {
        forks_are_watched = pthread_atfork(before_fork, in_parent, in_child) == 0;
        if (!forks_are_watched) {
            return;
        }
    }
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before); /* signals are for the threads of Python */
    pthread_t thread;
    while (num_workers < num && pthread_create(&thread, NULL, serve, NULL) == 0) {
        pthread_detach(thread);
        num_workers++;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

void work_together(void (*work)(void *), void *argument, int num_threads)
{
    int num = num_threads - 1 < MOST_WORKERS ? num_threads - 1 : MOST_WORKERS;
    if (num < 1 || pthread_mutex_trylock(&turn) != 0) {
        work(argument);
        return;
    }
    pthread_mutex_lock(&lock);
    hire(num);
    task.work = work;
    task.argument = argument;
    fegetenv(&task.environment);
    num_wanted = num_workers < num ? num_workers : num;
    pthread_cond_broadcast(&work_is_there);
    pthread_mutex_unlock(&lock);

    work(argument);

    pthread_mutex_lock(&lock);
    num_wanted = 0; /* who has not come by now is not waited for: nothing is left to do */
    while (num_running > 0) {
        pthread_cond_wait(&all_are_done, &lock);
    }
    pthread_mutex_unlock(&lock);
    pthread_mutex_unlock(&turn);
}
