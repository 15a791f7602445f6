// Command load sends requests to one address for a while and tells how many failed.
//
//	load -for 5s -workers 4 URL
//
// It prints "N requests, M failed, slowest D" and exits 1 when one failed. Every request is a
// connection of its own, so that each goes through the node's published port anew.
package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"
)

// requestTimeout is when a request has failed.
const requestTimeout = 5 * time.Second

type result struct {
	sent, failed int
	slowest      time.Duration
	first        error
}

func main() {
	length := flag.Duration("for", 5*time.Second, "how long; a SIGTERM ends it early")
	workers := flag.Int("workers", 4, "requests at once")
	flag.Parse()
	if flag.NArg() != 1 {
		fmt.Fprintln(os.Stderr, "usage: load [-for TIME] [-workers N] URL")
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	ctx, cancel := context.WithTimeout(ctx, *length)
	defer cancel()

	results := make([]result, *workers)
	var wait sync.WaitGroup
	for i := range results {
		wait.Go(func() { results[i] = work(ctx, flag.Arg(0)) })
	}
	wait.Wait()
	var all result
	for _, r := range results {
		all.sent += r.sent
		all.failed += r.failed
		all.slowest = max(all.slowest, r.slowest)
		if all.first == nil {
			all.first = r.first
		}
	}
	fmt.Printf("%d requests, %d failed, slowest %v\n", all.sent, all.failed, all.slowest.Round(time.Millisecond))
	if all.first != nil {
		fmt.Fprintln(os.Stderr, "load: first failure:", all.first)
		os.Exit(1)
	}
}

func work(ctx context.Context, url string) result {
	client := http.Client{Timeout: requestTimeout, Transport: &http.Transport{DisableKeepAlives: true}}
	var r result
	for ctx.Err() == nil {
		started := time.Now()
		err := fetch(&client, url)
		r.sent++
		r.slowest = max(r.slowest, time.Since(started))
		if err != nil {
			r.failed++
			if r.first == nil {
				r.first = err
			}
		}
	}
	return r
}

func fetch(client *http.Client, url string) error {
	response, err := client.Get(url)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	if _, err := io.Copy(io.Discard, response.Body); err != nil {
		return err
	}
	if response.StatusCode != http.StatusOK {
		return fmt.Errorf("%s: %s", url, response.Status)
	}
	return nil
}
