// Command workload is what runs in the containers of TestSurvive.
//
//	workload count SEED FILE    number lines on both outputs in bursts until SIGTERM, then
//	                            write how many there were on each to FILE
//	workload serve ADDRESS      answer every HTTP request with "ok"
//	workload exit CODE DELAY    say so on standard output, wait, exit
package main

import (
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"os/signal"
	"strconv"
	"syscall"
	"time"
)

// Lines come in bursts of up to maxBurst, so that writes end anywhere in a pipe's buffer; every
// stderrEvery-th burst also goes to standard error.
const (
	maxBurst    = 40
	stderrEvery = 5
	maxPause    = 40 * time.Millisecond
)

func main() {
	code, err := run(os.Args[1:])
	if err != nil {
		fmt.Fprintln(os.Stderr, "workload:", err)
		code = 126
	}
	os.Exit(code)
}

func run(args []string) (int, error) {
	switch {
	case len(args) == 3 && args[0] == "count":
		seed, err := strconv.ParseUint(args[1], 10, 64)
		if err != nil {
			return 0, err
		}
		return 0, count(seed, args[2])
	case len(args) == 2 && args[0] == "serve":
		return 0, http.ListenAndServe(args[1], http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			_, _ = io.WriteString(w, "ok")
		}))
	case len(args) == 3 && args[0] == "exit":
		code, err := strconv.Atoi(args[1])
		if err != nil {
			return 0, err
		}
		delay, err := time.ParseDuration(args[2])
		if err != nil {
			return 0, err
		}
		fmt.Println("exit", code)
		<-time.After(delay)
		return code, nil
	}
	return 0, fmt.Errorf("arguments %q are not known", args)
}

func count(seed uint64, file string) error {
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGTERM)
	rng := rand.New(rand.NewPCG(seed, 0))
	var lines [2]int
	for burst := 0; ; burst++ {
		outputs := []*os.File{os.Stdout}
		if burst%stderrEvery == 0 {
			outputs = append(outputs, os.Stderr)
		}
		for i, out := range outputs {
			var text bytes.Buffer
			for range 1 + rng.IntN(maxBurst) {
				lines[i]++
				fmt.Fprintln(&text, lines[i])
			}
			// One write or many: what is written before a kill must come out whole either way.
			step := text.Len()
			if rng.IntN(2) == 0 {
				step = 1 + rng.IntN(step)
			}
			for text.Len() > 0 {
				if _, err := out.Write(text.Next(step)); err != nil {
					return err
				}
			}
		}
		select {
		case <-stop:
			return os.WriteFile(file, fmt.Appendf(nil, "%d %d\n", lines[0], lines[1]), 0o644)
		case <-time.After(time.Duration(rng.Int64N(int64(maxPause)))):
		}
	}
}
