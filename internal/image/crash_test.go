package image_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"berth/internal/errdefs"
	"berth/internal/image"
)

// childEnv makes the test binary a child that pulls into the named directory.
const childEnv = "BERTH_IMAGE_TEST_PULL"

// childPull pulls, loads and removes until it is killed.
func childPull(dir string) {
	s, err := image.Open(context.Background(), config(dir))
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	fmt.Println("open")
	go func() { _ = s.Run(context.Background()) }()
	for {
		for _, ref := range strings.Fields(os.Getenv("BERTH_IMAGE_TEST_REFS")) {
			if _, err := s.Pull(context.Background(), ref, image.PullOptions{}); err != nil {
				fmt.Fprintln(os.Stderr, err)
				os.Exit(1)
			}
			fmt.Println("pulled", ref)
		}
		for _, ref := range strings.Fields(os.Getenv("BERTH_IMAGE_TEST_REFS"))[1:] {
			if _, err := s.Remove(context.Background(), ref, true, true, nobody); err != nil {
				fmt.Fprintln(os.Stderr, err)
				os.Exit(1)
			}
		}
	}
}

func TestKilledAnywhere(t *testing.T) {
	needRoot(t)
	const rounds = 25
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 1))
	g := newRegistry(t)
	shared := bigLayer(t, 1, 2<<20)
	g.put(t, "keep", "latest", testImage{layers: [][]byte{shared, bigLayer(t, 2, 1<<18)}})
	g.put(t, "churn", "latest", testImage{layers: [][]byte{shared, bigLayer(t, 3, 3<<20), threeLayers(t).layers[0]}})
	keep, churn := g.host()+"/keep:latest", g.host()+"/churn:latest"
	dir := t.TempDir()
	kept := false
	for range rounds {
		if killedRound(t, dir, keep, churn, time.Duration(rng.IntN(500))*time.Millisecond) {
			kept = true
		}
		if !kept {
			continue
		}
		s, err := image.Open(t.Context(), config(dir))
		if err != nil {
			t.Fatal(err)
		}
		img, err := s.Resolve(t.Context(), keep)
		if err != nil {
			t.Errorf("an image that was complete is lost: %v", err)
		} else if got := tree(t, s, img.ID); len(got) != 2 || len(got["big1"]) != 2<<20 {
			t.Errorf("an image that was complete is damaged: %d files", len(got))
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
	s := openStore(t, config(dir))
	for _, ref := range []string{keep, churn} {
		img, err := s.Pull(t.Context(), ref, image.PullOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if n := len(tree(t, s, img.ID)); n < 2 {
			t.Errorf("%s has %d files", ref, n)
		}
		if _, err := s.Remove(t.Context(), ref, true, true, nobody); err != nil {
			t.Fatal(err)
		}
	}
	gc(t, s)
	wantEmpty(t, dir)
}

// killedRound runs a child on the store and kills it after d; it tells whether keep was complete.
func killedRound(t *testing.T, dir, keep, churn string, d time.Duration) bool {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), childEnv+"="+dir, "BERTH_IMAGE_TEST_REFS="+keep+" "+churn)
	var out, errs strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	timer := time.AfterFunc(d, func() { _ = cmd.Process.Kill() })
	defer timer.Stop()
	err := cmd.Wait()
	t.Logf("%v: %v, %d lines", d, err, strings.Count(out.String(), "\n"))
	if err != nil && !strings.Contains(err.Error(), "killed") {
		t.Fatalf("child: %v: %s", err, errs.String())
	}
	return strings.Contains(out.String(), "pulled "+keep)
}

func TestKilledDownloadIsResumed(t *testing.T) {
	needRoot(t)
	g := newRegistry(t)
	g.put(t, "app", "latest", testImage{layers: [][]byte{bigLayer(t, 1, 4<<20)}, compress: []string{""}})
	ref := g.host() + "/app:latest"
	half := make(chan struct{}, 1)
	g.setFault(slowAfter(g, 3<<20, half))
	dir := t.TempDir()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), childEnv+"="+dir, "BERTH_IMAGE_TEST_REFS="+ref)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	<-half
	deadline := time.Now().Add(10 * time.Second)
	for partialSize(dir) < 2<<20 && time.Now().Before(deadline) {
		time.Sleep(5 * time.Millisecond) // polls the child's progress
	}
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	g.setFault(nil)
	s := openStore(t, config(dir))
	gc(t, s) // a collection in between must not eat the partial download
	if _, err := s.Pull(t.Context(), ref, image.PullOptions{}); err != nil {
		t.Fatal(err)
	}
	resumed := false
	g.mu.Lock()
	for _, l := range g.log {
		resumed = resumed || (strings.HasPrefix(l, "GET /v2/app/blobs/") && strings.Contains(l, "bytes="))
	}
	g.mu.Unlock()
	if !resumed {
		t.Error("the download was not resumed with a range")
	}
	_, ingests, _ := leftovers(t, dir)
	if len(ingests) > 0 {
		t.Errorf("ingests left: %v", ingests)
	}
}

func TestOneProcessPerStore(t *testing.T) {
	s, dir := newStore(t)
	_ = s
	c := config(dir)
	c.LockTimeout = 50 * time.Millisecond
	_, err := image.Open(t.Context(), c)
	wantKind(t, err, errdefs.ErrUnavailable, "another process has it open")
}

func TestOpenDamagedDatabase(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(dir+"/metadata.db", []byte(strings.Repeat("not a database ", 4096)), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err := image.Open(t.Context(), config(dir))
	wantKind(t, err, errdefs.ErrDataLoss, "move the directory away")
}

func TestFullDisk(t *testing.T) {
	needRoot(t)
	dir := t.TempDir()
	mountTmpfs(t, dir, "12m")
	s := openStore(t, config(dir))
	g := newRegistry(t)
	g.put(t, "small", "latest", threeLayers(t))
	g.put(t, "download", "latest", testImage{layers: [][]byte{bigLayer(t, 1, 16<<20)}})
	zeros := tarOf(t, entry{name: "zeros", data: strings.Repeat("\x00", 64<<20)})
	g.put(t, "unpack", "latest", testImage{layers: [][]byte{bigLayer(t, 2, 1<<20), zeros}})
	for _, name := range []string{"download", "unpack", "download", "unpack"} {
		_, err := s.Pull(t.Context(), g.host()+"/"+name, image.PullOptions{})
		wantKind(t, err, errdefs.ErrExhausted, "no space left on device")
		wantEmpty(t, dir)
	}
	archive := dockerArchive(t, []archived{{img: testImage{layers: [][]byte{bigLayer(t, 3, 16<<20)}}, tags: []string{"x:1"}}})
	_, err := s.Load(t.Context(), strings.NewReader(string(archive)), nil)
	wantKind(t, err, errdefs.ErrExhausted, "no space left on device")
	wantEmpty(t, dir)
	// What fits still works.
	img, err := s.Pull(t.Context(), g.host()+"/small", image.PullOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if n := len(tree(t, s, img.ID)); n != 2 {
		t.Errorf("%d files", n)
	}
}
