package gitserver

import (
	"bytes"
	"context"
	"fmt"
	"net/url"
	"os"
	"path"
	"path/filepath"
	"strings"

	"gopkg.in/yaml.v3"

	"github.com/m3o/m3o"
)

// Limits of submodules.
const (
	maxSubmodules     = 50 // of one commit, nested ones included
	maxSubmoduleDepth = 5
)

// A Graft says what tree to make of a commit in place of its own.
type Graft struct {
	// Dir is the folder of the app in a repository of many: a clean path, ""
	// for all of it. A folder with a go.mod, Dockerfile or m3o.yaml of its own
	// is built as if it were all there is; any other is a main package of the
	// module around it.
	Dir string
	// Remote is where the commit came from, for its submodules; nil leaves
	// them out.
	Remote *Remote
	// OnSubmodule is told of each one before it is fetched.
	OnSubmodule func(path, url string)
}

// Tree is the tree to build for commit of the repository repo, an object that
// Source.Tree can name; "" when it is the commit's own. quarantine is as in
// Source.
func (s *Server) Tree(ctx context.Context, app, repo, quarantine, commit string, g Graft) (string, error) {
	ctx, release, err := s.use(ctx, app)
	if err != nil {
		return "", err
	}
	clean := false
	defer func() { release(clean) }()
	tmp, err := os.MkdirTemp("", "m3o-index-")
	if err != nil {
		return "", fmt.Errorf("make index: %w", err)
	}
	defer os.RemoveAll(tmp) //nolint:errcheck // a leftover harms nobody
	x := &grafter{repo: repo, g: g, env: []string{"GIT_INDEX_FILE=" + filepath.Join(tmp, "index"), "GIT_WORK_TREE=" + tmp}}
	if quarantine != "" {
		x.env = append(x.env, "GIT_OBJECT_DIRECTORY="+quarantine, "GIT_ALTERNATE_OBJECT_DIRECTORIES="+filepath.Join(repo, "objects"))
	}
	tree, err := x.submodules(ctx, commit)
	if err == nil && g.Dir != "" {
		tree, err = x.folder(ctx, commit, tree)
	}
	clean = err == nil
	return tree, err
}

type grafter struct {
	repo  string
	g     Graft
	env   []string
	count int
}

func (x *grafter) git(ctx context.Context, in string, args ...string) (string, error) {
	out, err := runGit(ctx, x.repo, x.env, in, args...)
	return strings.TrimSuffix(out, "\n"), err
}

// submodules puts the trees of the submodules where the commit only names
// them. It returns "" when there are none.
func (x *grafter) submodules(ctx context.Context, commit string) (string, error) {
	if x.g.Remote == nil {
		return "", nil
	}
	u, err := url.Parse(x.g.Remote.URL)
	if err != nil {
		return "", fmt.Errorf("read address: %w", err)
	}
	found, err := x.links(ctx, commit, "", u, 0)
	if err != nil || len(found) == 0 {
		return "", err
	}
	if _, err := x.git(ctx, "", "read-tree", commit); err != nil {
		return "", err
	}
	for _, l := range found { // outer ones first
		if _, err := x.git(ctx, "", "update-index", "--force-remove", "--", l.path); err != nil {
			return "", err
		}
		if _, err := x.git(ctx, "", "read-tree", "--prefix="+l.path+"/", l.commit); err != nil {
			return "", &m3o.Error{Kind: m3o.Invalid, Msg: "the submodule " + l.path + " cannot be put into the tree", Hint: "check .gitmodules", Err: err}
		}
	}
	return x.git(ctx, "", "write-tree")
}

type link struct{ path, commit string }

// links fetches the submodules of a commit and of those, and lists where they
// belong. at is the folder the commit's own tree is at.
func (x *grafter) links(ctx context.Context, commit, at string, base *url.URL, depth int) ([]link, error) {
	out, err := x.git(ctx, "", "ls-tree", "-r", "-z", "--full-tree", commit)
	if err != nil {
		return nil, err
	}
	var links []link
	for entry := range strings.SplitSeq(out, "\x00") {
		meta, name, ok := strings.Cut(entry, "\t")
		if f := strings.Fields(meta); ok && len(f) == 3 && f[0] == "160000" && isHash(f[2]) {
			links = append(links, link{name, f[2]})
		}
	}
	if len(links) == 0 {
		return nil, nil
	}
	urls, err := x.gitmodules(ctx, commit)
	if err != nil {
		return nil, err
	}
	var all []link
	for _, l := range links {
		full := path.Join(at, l.path)
		if x.count++; x.count > maxSubmodules || depth >= maxSubmoduleDepth {
			return nil, &m3o.Error{Kind: m3o.Invalid, Msg: fmt.Sprintf("there are more than %d submodules, or they are more than %d deep", maxSubmodules, maxSubmoduleDepth),
				Hint: "vendor what the build needs"}
		}
		r, next, err := x.remoteOf(full, urls[l.path], base)
		if err != nil {
			return nil, err
		}
		if x.g.OnSubmodule != nil {
			x.g.OnSubmodule(full, r.URL)
		}
		if !has(ctx, x.repo, l.commit) {
			args := []string{"fetch", "--quiet", "--depth=1", "--no-tags", "--no-write-fetch-head", "--no-auto-maintenance", "--no-recurse-submodules", "--", r.URL, l.commit}
			if _, err := r.git(ctx, x.repo, FetchLimits{}, args...); err != nil {
				return nil, &m3o.Error{Kind: m3o.KindOf(err), Msg: "submodule " + full + ": " + err.Error(), Hint: m3o.HintOf(err), Err: err}
			}
		}
		all = append(all, link{full, l.commit})
		inner, err := x.links(ctx, l.commit, full, next, depth+1)
		if err != nil {
			return nil, err
		}
		all = append(all, inner...)
	}
	return all, nil
}

// gitmodules reads path → url from the commit's .gitmodules, which git parses.
func (x *grafter) gitmodules(ctx context.Context, commit string) (map[string]string, error) {
	out, err := x.git(ctx, "", "config", "--blob", commit+":.gitmodules", "--null", "--list")
	if err != nil {
		return nil, &m3o.Error{Kind: m3o.Invalid, Msg: "the commit has submodules, but no .gitmodules that says where they are", Hint: "git submodule add makes both", Err: err}
	}
	paths, urls := map[string]string{}, map[string]string{}
	for kv := range strings.SplitSeq(out, "\x00") {
		key, value, _ := strings.Cut(kv, "\n")
		name, ok := strings.CutPrefix(key, "submodule.")
		if !ok {
			continue
		}
		if n, ok := strings.CutSuffix(name, ".path"); ok {
			paths[n] = value
		}
		if n, ok := strings.CutSuffix(name, ".url"); ok {
			urls[n] = value
		}
	}
	byPath := map[string]string{}
	for n, p := range paths {
		byPath[path.Clean(p)] = urls[n]
	}
	return byPath, nil
}

// remoteOf is where a submodule comes from: https and ssh only, and the
// credential of the repository only for the same host.
func (x *grafter) remoteOf(at, raw string, base *url.URL) (Remote, *url.URL, error) {
	if raw == "" {
		return Remote{}, nil, &m3o.Error{Kind: m3o.Invalid, Msg: ".gitmodules does not say where the submodule " + at + " is", Hint: "git submodule add makes the entry"}
	}
	switch {
	case strings.HasPrefix(raw, "./"), strings.HasPrefix(raw, "../"):
		u := *base
		u.Path = path.Join(base.Path, raw)
		raw = u.String()
	case !strings.Contains(raw, "://") && strings.Contains(raw, ":"): // git@host:owner/name
		host, p, _ := strings.Cut(raw, ":")
		raw = "ssh://" + host + "/" + strings.TrimPrefix(p, "/")
	}
	u, err := CheckRemote(raw)
	if err != nil {
		return Remote{}, nil, &m3o.Error{Kind: m3o.Invalid, Msg: "submodule " + at + ": " + err.Error(), Hint: "only https:// and ssh:// are fetched", Err: err}
	}
	r := Remote{URL: raw, CAFile: x.g.Remote.CAFile}
	own, err := url.Parse(x.g.Remote.URL)
	if err != nil {
		return r, u, fmt.Errorf("read address: %w", err)
	}
	if u.Hostname() == own.Hostname() {
		same := *x.g.Remote
		// Most .gitmodules name either https or ssh, whatever the credential is for.
		if u.Scheme != own.Scheme || u.Host != own.Host {
			moved := *own
			moved.Path = u.Path
			u = &moved
		}
		same.URL = u.String()
		return same, u, nil
	}
	if u.Scheme == "ssh" {
		// Without a credential ssh is of no use; the same path is mostly public by https.
		u = &url.URL{Scheme: "https", Host: u.Hostname(), Path: u.Path}
		r.URL = u.String()
	}
	return r, u, nil
}

// folder makes the tree of one folder's app. tree is "" for the commit's own.
func (x *grafter) folder(ctx context.Context, commit, tree string) (string, error) {
	root := tree
	if root == "" {
		root = commit + "^{tree}"
	}
	dir := path.Clean(x.g.Dir)
	kind := func(p string) string {
		out, err := x.git(ctx, "", "cat-file", "-t", root+":"+p)
		if tree == "" {
			out, err = x.git(ctx, "", "cat-file", "-t", commit+":"+p)
		}
		if err != nil {
			return ""
		}
		return out
	}
	at := commit
	if tree != "" {
		at = tree
	}
	if kind(dir) != "tree" {
		return "", &m3o.Error{Kind: m3o.NotFound, Msg: "the commit has no folder " + dir, Hint: "m3o repo:connect --dir names another"}
	}
	if kind(dir+"/go.mod") == "blob" || kind(dir+"/Dockerfile") == "blob" || kind("go.mod") != "blob" {
		return x.git(ctx, "", "rev-parse", "--verify", "--end-of-options", at+":"+dir)
	}
	// A main package of the module at the root: the same tree, with an m3o.yaml
	// that says so, and the folder's own files about m3o in the root's place.
	if _, err := x.git(ctx, "", "read-tree", at); err != nil {
		return "", err
	}
	manifest := ""
	for _, f := range []string{"m3o.yaml", dir + "/m3o.yaml"} {
		if kind(f) == "blob" {
			out, err := runGit(ctx, x.repo, x.env, "", "cat-file", "blob", at+":"+f)
			if err != nil {
				return "", err
			}
			manifest = out
		}
	}
	manifest, err := withMain(manifest, "./"+dir)
	if err != nil {
		return "", err
	}
	blob, err := x.git(ctx, manifest, "hash-object", "-w", "--stdin")
	if err != nil {
		return "", err
	}
	info := "100644 " + blob + "\tm3o.yaml\n"
	for _, f := range []string{"Procfile", "app.json"} {
		if kind(dir+"/"+f) == "blob" {
			hash, err := x.git(ctx, "", "rev-parse", "--verify", "--end-of-options", at+":"+dir+"/"+f)
			if err != nil {
				return "", err
			}
			info += "100644 " + hash + "\t" + f + "\n"
		}
	}
	if _, err := x.git(ctx, info, "update-index", "--add", "--index-info"); err != nil {
		return "", err
	}
	return x.git(ctx, "", "write-tree")
}

// withMain is an m3o.yaml whose build.main is pkg, unless it says another.
func withMain(text, pkg string) (string, error) {
	doc := map[string]any{}
	if len(text) > 64<<10 {
		return text, nil // the build says why it is refused
	}
	if err := yaml.Unmarshal([]byte(text), &doc); err != nil {
		return text, nil //nolint:nilerr // the build says why it is refused, with the line
	}
	build, _ := doc["build"].(map[string]any)
	if build == nil {
		build = map[string]any{}
	}
	if _, ok := build["main"]; ok {
		return text, nil
	}
	build["main"] = pkg
	if doc == nil {
		doc = map[string]any{}
	}
	doc["build"] = build
	var b bytes.Buffer
	enc := yaml.NewEncoder(&b)
	if err := enc.Encode(doc); err != nil {
		return "", fmt.Errorf("write m3o.yaml: %w", err)
	}
	return b.String(), nil
}
