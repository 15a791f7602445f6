package launch

import (
	"bytes"
	"encoding/binary"
	"io"
	"os"
)

// Split returns the one kept file's calls and program.
func (p *Programs) Split() (calls, program []byte) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, file := range p.files {
		raw, err := io.ReadAll(io.NewSectionReader(file, 0, maxProgram))
		if err != nil {
			panic(err)
		}
		n := binary.NativeEndian.Uint32(raw[4:])
		return raw[12 : 12+n], raw[12+n:]
	}
	return nil, nil
}

// Join replaces the one kept file.
func (p *Programs) Join(calls, program []byte) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for key, file := range p.files {
		magic := make([]byte, 4)
		if _, err := file.ReadAt(magic, 0); err != nil {
			panic(err)
		}
		var head [8]byte
		binary.NativeEndian.PutUint32(head[:], uint32(len(calls)))
		binary.NativeEndian.PutUint32(head[4:], uint32(len(program)))
		next, err := sealed(bytes.Join([][]byte{magic, head[:], calls, program}, nil))
		if err != nil {
			panic(err)
		}
		_ = file.Close()
		p.files = map[[32]byte]*os.File{key: next}
	}
}
