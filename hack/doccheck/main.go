// Command doccheck tells which relative links and code paths in the project's documents lead
// nowhere.
//
//	doccheck FILE-OR-DIRECTORY...
package main

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
)

var (
	link = regexp.MustCompile(`\]\(([^)\s]+)\)`)
	// A path of the repository in code quotes: it has a slash and begins with a known directory.
	code = regexp.MustCompile("`((?:internal|cmd|hack|test|examples|docs)/[A-Za-z0-9_./-]*[A-Za-z0-9_])`")
)

func main() {
	bad := 0
	for _, arg := range os.Args[1:] {
		err := filepath.WalkDir(arg, func(path string, entry fs.DirEntry, err error) error {
			if err != nil || entry.IsDir() || filepath.Ext(path) != ".md" {
				return err
			}
			n, err := check(path)
			bad += n
			return err
		})
		if err != nil {
			fmt.Fprintln(os.Stderr, "doccheck:", err)
			os.Exit(1)
		}
	}
	if bad > 0 {
		os.Exit(1)
	}
}

// check prints what is broken in one document and returns how much.
func check(document string) (int, error) {
	text, err := os.ReadFile(document)
	if err != nil {
		return 0, err
	}
	bad := 0
	missing := func(line int, target, path string) {
		if _, err := os.Stat(path); err != nil {
			fmt.Printf("%s:%d: %s does not exist\n", document, line, target)
			bad++
		}
	}
	for i, line := range strings.Split(string(text), "\n") {
		for _, m := range link.FindAllStringSubmatch(line, -1) {
			target, _, _ := strings.Cut(m[1], "#")
			if target == "" || strings.Contains(target, "://") || strings.HasPrefix(target, "mailto:") {
				continue
			}
			missing(i+1, m[1], filepath.Join(filepath.Dir(document), target))
		}
		for _, m := range code.FindAllStringSubmatch(line, -1) {
			missing(i+1, m[1], m[1])
		}
	}
	return bad, nil
}
