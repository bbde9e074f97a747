package source

import (
	"bufio"
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"

	"github.com/m3o/m3o"
)

// maxInMemory is the largest blob read through the shared process, whole.
// Larger ones get a process of their own and are streamed.
const maxInMemory = 4 << 20

// catFile reads blobs through `git cat-file --batch`, twice as fast as go-git
// and at constant memory whatever a pack holds. The process starts with the
// first read.
type catFile struct {
	env []string
	dir string

	mu     sync.Mutex // guards the rest; held for one request and its answer
	cmd    *exec.Cmd
	in     io.WriteCloser
	out    *bufio.Reader
	broken error // the process is out of step with us or gone
	closed bool
}

func newCatFile(src m3o.Source) *catFile {
	dirs := objectDirs(src)
	// An environment from scratch: nothing the daemon was started with may
	// point git elsewhere, and no configuration of the machine takes part.
	env := []string{"PATH=" + os.Getenv("PATH"), "HOME=/nonexistent", "LC_ALL=C", "GIT_CONFIG_NOSYSTEM=1",
		"GIT_CONFIG_GLOBAL=" + os.DevNull, "GIT_DIR=" + src.Repo, "GIT_OBJECT_DIRECTORY=" + dirs[0], "GIT_NO_LAZY_FETCH=1"}
	if len(dirs) > 1 {
		// Quoted as git wants it: a plain colon would end the path.
		env = append(env, "GIT_ALTERNATE_OBJECT_DIRECTORIES="+strconv.Quote(dirs[1]))
	}
	return &catFile{env: env, dir: src.Repo}
}

func (c *catFile) command(args ...string) *exec.Cmd {
	cmd := exec.Command("git", args...)
	cmd.Env, cmd.Dir = c.env, c.dir
	return cmd
}

func (c *catFile) open(_ string, e entry) (io.ReadCloser, error) {
	h := hex.EncodeToString(e.hash[:])
	if e.size > maxInMemory {
		return c.stream(h)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	b, err := c.read(h, e.size)
	if err != nil {
		return nil, fmt.Errorf("read blob %s: %w", h, err)
	}
	return io.NopCloser(bytes.NewReader(b)), nil
}

// read asks for one blob. Called with mu held.
func (c *catFile) read(h string, size int64) ([]byte, error) {
	if c.closed {
		return nil, os.ErrClosed
	}
	if c.broken != nil {
		return nil, c.broken
	}
	if c.cmd == nil {
		if err := c.start(); err != nil {
			return nil, err
		}
	}
	b, err := func() ([]byte, error) {
		if _, err := io.WriteString(c.in, h+"\n"); err != nil {
			return nil, err
		}
		line, err := c.out.ReadString('\n')
		if err != nil {
			return nil, noEOF(err)
		}
		f := strings.Fields(line)
		if len(f) != 3 || f[0] != h || f[1] != "blob" || f[2] != strconv.FormatInt(size, 10) {
			return nil, fmt.Errorf("git cat-file answered %q", strings.TrimSpace(line))
		}
		b := make([]byte, size+1) // and a newline
		_, err = io.ReadFull(c.out, b)
		return b[:size], noEOF(err)
	}()
	if err != nil {
		c.broken = err // what else is in the pipe belongs to this request
	}
	return b, err
}

func noEOF(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

func (c *catFile) start() error {
	cmd := c.command("cat-file", "--batch")
	in, err := cmd.StdinPipe()
	if err != nil {
		return err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start git cat-file: %w", err)
	}
	c.cmd, c.in, c.out = cmd, in, bufio.NewReaderSize(out, 128<<10)
	return nil
}

// stream reads one large blob through a process that ends with the reader.
func (c *catFile) stream(h string) (io.ReadCloser, error) {
	cmd := c.command("cat-file", "blob", h)
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start git cat-file: %w", err)
	}
	return &blobStream{cmd: cmd, out: out}, nil
}

type blobStream struct {
	cmd  *exec.Cmd
	out  io.Reader
	done bool
	err  error
}

// Read ends with git's own verdict, so that a blob cut short is not taken for whole.
func (b *blobStream) Read(p []byte) (int, error) {
	if b.done {
		return 0, b.err
	}
	n, err := b.out.Read(p)
	if err != nil {
		b.done, b.err = true, err
		if werr := b.cmd.Wait(); werr != nil {
			b.err = fmt.Errorf("git cat-file: %w", werr)
		}
	}
	return n, b.err
}

func (b *blobStream) Close() error {
	if !b.done {
		b.done, b.err = true, os.ErrClosed
		_ = b.cmd.Process.Kill()
		_ = b.cmd.Wait()
	}
	return nil
}

// Close ends the process and waits for it.
func (c *catFile) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.closed = true
	if c.cmd == nil {
		return nil
	}
	cmd := c.cmd
	c.cmd = nil
	_ = c.in.Close()
	if c.broken != nil {
		_ = cmd.Process.Kill() // it may be stuck writing what nobody reads
		_ = cmd.Wait()
		return nil
	}
	if err := cmd.Wait(); err != nil {
		return fmt.Errorf("git cat-file: %w", err)
	}
	return nil
}
