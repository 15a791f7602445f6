package main

import (
	"debug/elf"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// programs adds executables of a Debian package at their own paths, with the loader and the
// shared libraries that they need, taken from the packages that it depends on (so the machine's
// own libraries do not matter).
func (t *tree) programs(debs packages, pkg string, paths ...string) error {
	c := closure{debs: debs, tree: t, seen: map[string]bool{}, roots: map[string]string{}}
	root, err := debs.root(pkg)
	if err != nil {
		return err
	}
	for _, path := range paths {
		file, err := locate(root, path)
		if err != nil {
			return fmt.Errorf("%s: %w", pkg, err)
		}
		if err := t.copy(path, file, 0o755); err != nil {
			return err
		}
		if err := c.needs(file, pkg); err != nil {
			return err
		}
	}
	return nil
}

// locate finds a program in an unpacked package: at its path, at the same below /usr (newer
// Debian), or, for redis-server, where its own package links it to.
func locate(root, path string) (string, error) {
	candidates := []string{path, "/usr" + path}
	if filepath.Base(path) == "redis-server" {
		candidates = append(candidates, filepath.Join(filepath.Dir(path), "redis-check-rdb"))
	}
	for _, candidate := range candidates {
		if file, err := filepath.EvalSymlinks(filepath.Join(root, candidate)); err == nil && isFile(file) {
			return file, nil
		}
	}
	return "", fmt.Errorf("%s is not in it", path)
}

// closure collects what executables need.
type closure struct {
	debs  packages
	tree  *tree
	seen  map[string]bool   // sonames and loaders done
	roots map[string]string // package → directory
}

// needs adds the loader and libraries of an ELF file that package pkg holds.
func (c *closure) needs(file, pkg string) error {
	f, err := elf.Open(file)
	if err != nil {
		return fmt.Errorf("%s: %w", file, err)
	}
	defer f.Close()
	wanted, err := f.ImportedLibraries()
	if err != nil {
		return fmt.Errorf("%s: %w", file, err)
	}
	if interpreter := f.Section(".interp"); interpreter != nil {
		path, err := interpreter.Data()
		if err != nil {
			return fmt.Errorf("%s: %w", file, err)
		}
		if err := c.loader(strings.TrimRight(string(path), "\x00")); err != nil {
			return err
		}
	}
	for _, soname := range wanted {
		if c.seen[soname] {
			continue
		}
		c.seen[soname] = true
		found, owner, err := c.find(soname, pkg)
		if err != nil {
			return err
		}
		if err := c.tree.copy("/usr/lib/"+filepath.Base(filepath.Dir(found))+"/"+soname, found, 0o644); err != nil {
			return err
		}
		if err := c.needs(found, owner); err != nil {
			return err
		}
	}
	return nil
}

// loader adds the program that the kernel starts for a dynamic executable.
func (c *closure) loader(path string) error {
	if c.seen[path] {
		return nil
	}
	c.seen[path] = true
	found, _, err := c.find(filepath.Base(path), "libc6")
	if err != nil {
		return err
	}
	return c.tree.copy(path, found, 0o755)
}

// find looks for a library in the package itself and breadth-first in what it depends on.
func (c *closure) find(soname, pkg string) (file, owner string, err error) {
	queue, visited := []string{pkg}, []string{pkg}
	for len(queue) > 0 {
		name := queue[0]
		queue = queue[1:]
		root, ok := c.roots[name]
		if !ok {
			if root, err = c.debs.root(name); err != nil {
				return "", "", err
			}
			c.roots[name] = root
		}
		for _, pattern := range []string{"lib/*/", "usr/lib/*/", "lib64/", "usr/lib64/"} {
			matches, err := filepath.Glob(filepath.Join(root, pattern, soname))
			if err != nil {
				return "", "", err
			}
			for _, match := range matches {
				if real, err := filepath.EvalSymlinks(match); err == nil && isFile(real) {
					return real, name, nil
				}
			}
		}
		deps, err := c.debs.libraries(name)
		if err != nil {
			return "", "", err
		}
		for _, dep := range deps {
			if !slices.Contains(visited, dep) {
				visited, queue = append(visited, dep), append(queue, dep)
			}
		}
	}
	return "", "", fmt.Errorf("library %s: no package that %s depends on holds it", soname, pkg)
}

func isFile(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.Mode().IsRegular()
}
