// Command guestbook is the web front of the sample application: a page that counts its visits
// and keeps what visitors write, in Redis.
//
// Configuration comes from the environment: GUESTBOOK_LISTEN (":8080"), GUESTBOOK_TITLE,
// REDIS_ADDR ("store:6379"). On SIGTERM it finishes the requests it has and leaves.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/redis/go-redis/v9"
)

// Time limits of the server.
const (
	requestTimeout  = 5 * time.Second
	shutdownTimeout = 8 * time.Second // below docker's 10 seconds before SIGKILL
	checkTimeout    = 2 * time.Second
)

func main() {
	check := flag.String("check", "", "fetch this address and exit 0 when it answers 200; the image's health check")
	flag.Parse()
	var err error
	if *check != "" {
		err = checkHealth(*check)
	} else {
		err = run()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "guestbook:", err)
		os.Exit(1)
	}
}

// run serves until SIGTERM or SIGINT.
func run() error {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()

	// The client connects when it is first used and tries again by itself, so the front may
	// start before its store and survives the store's restarts.
	client := redis.NewClient(&redis.Options{
		Addr:            env("REDIS_ADDR", "store:6379"),
		DialTimeout:     time.Second,
		ReadTimeout:     2 * time.Second,
		MaxRetries:      5,
		MinRetryBackoff: 50 * time.Millisecond,
		MaxRetryBackoff: 500 * time.Millisecond,
	})
	defer client.Close()

	host, err := os.Hostname()
	if err != nil {
		return err
	}
	site := &site{title: env("GUESTBOOK_TITLE", "Guestbook"), host: host, store: store{client}}
	server := &http.Server{
		Addr:              env("GUESTBOOK_LISTEN", ":8080"),
		Handler:           http.TimeoutHandler(site.routes(), requestTimeout, "the store is slow\n"),
		ReadHeaderTimeout: requestTimeout,
	}
	failed := make(chan error, 1)
	go func() { failed <- server.ListenAndServe() }()
	slog.Info("listening", "address", server.Addr, "store", client.Options().Addr)
	select {
	case err := <-failed:
		return err
	case <-ctx.Done():
	}
	slog.Info("stopping")
	finish, cancel := context.WithTimeout(context.Background(), shutdownTimeout)
	defer cancel()
	if err := server.Shutdown(finish); err != nil && !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// checkHealth fetches address once.
func checkHealth(address string) error {
	client := http.Client{Timeout: checkTimeout}
	response, err := client.Get(address)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		return fmt.Errorf("%s answered %s", address, response.Status)
	}
	return nil
}

func env(name, otherwise string) string {
	if v := os.Getenv(name); v != "" {
		return v
	}
	return otherwise
}
