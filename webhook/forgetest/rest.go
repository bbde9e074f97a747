package forgetest

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
)

// A call is one request with its body read.
type call struct {
	r    *http.Request
	body map[string]any
}

func (c call) text(keys ...string) string {
	var v any = c.body
	for _, k := range keys {
		m, _ := v.(map[string]any)
		v = m[k]
	}
	s, _ := v.(string)
	return s
}

// rest registers the calls of each forge that are used, as their documentation
// has them.
func (f *Forge) rest(mux *http.ServeMux) {
	on := func(pattern string, code int, do func(c call) any) {
		mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
			auth := r.Header.Get("Authorization") + r.Header.Get("Private-Token")
			w.Header().Set("Content-Type", "application/json")
			name := r.PathValue("owner") + "/" + r.PathValue("name")
			if id := r.PathValue("id"); id != "" {
				name = id
			}
			f.mu.Lock()
			defer f.mu.Unlock()
			private, known := f.private[name]
			switch {
			case !known || private && auth == "":
				w.WriteHeader(http.StatusNotFound)
				_, _ = w.Write([]byte(`{"message":"Not Found"}`))
				return
			case auth == "" && r.Method == http.MethodGet:
			case !strings.HasSuffix(auth, f.token):
				w.WriteHeader(http.StatusUnauthorized)
				_, _ = w.Write([]byte(`{"message":"Bad credentials"}`))
				return
			}
			c := call{r: r, body: map[string]any{}}
			_ = json.NewDecoder(r.Body).Decode(&c.body)
			out := do(c)
			if out == nil && r.Method != http.MethodDelete {
				w.WriteHeader(http.StatusNotFound)
				_, _ = w.Write([]byte(`{"message":"Not Found"}`))
				return
			}
			w.WriteHeader(code)
			if out != nil {
				_ = json.NewEncoder(w).Encode(out)
			}
		})
	}
	type m = map[string]any
	next := func() int { f.last++; return f.last }
	status := func(commit, context, state, url, text string) any {
		f.statuses = append(f.statuses, Status{commit, context, state, url, text})
		return m{"id": next(), "state": state}
	}
	hook := func(url, secret string) int {
		id := next()
		f.hooks[id] = Hook{url, secret}
		return id
	}
	key := func(text string) int {
		id := next()
		f.keys[id] = text
		return id
	}
	comment := func(pull int, text string) int {
		id := next()
		f.comments[id] = &Comment{Pull: pull, Text: text}
		return id
	}
	edit := func(id int, text string) any {
		c := f.comments[id]
		if c == nil {
			return nil
		}
		c.Text, c.Edits = text, c.Edits+1
		return m{"id": id}
	}
	unhook := func(c call) any { delete(f.hooks, number(c.r.PathValue("n"))); return nil }
	unkey := func(c call) any { delete(f.keys, number(c.r.PathValue("n"))); return nil }

	for _, v := range []string{"/api/v3", "/api/v1"} { // GitHub Enterprise and Gitea
		repo := v + "/repos/{owner}/{name}"
		on("GET "+repo, 200, func(c call) any {
			name := c.r.PathValue("owner") + "/" + c.r.PathValue("name")
			if to := f.renamed[name]; to != "" {
				name = to
			}
			return m{"full_name": name, "default_branch": "main", "private": f.private[name]}
		})
		on("POST "+repo+"/statuses/{sha}", 201, func(c call) any {
			return status(c.r.PathValue("sha"), c.text("context"), c.text("state"), c.text("target_url"), c.text("description"))
		})
		on("POST "+repo+"/hooks", 201, func(c call) any { return m{"id": hook(c.text("config", "url"), c.text("config", "secret"))} })
		on("DELETE "+repo+"/hooks/{n}", 204, unhook)
		on("POST "+repo+"/keys", 201, func(c call) any { return m{"id": key(c.text("key"))} })
		on("DELETE "+repo+"/keys/{n}", 204, unkey)
		on("POST "+repo+"/issues/{n}/comments", 201, func(c call) any { return m{"id": comment(number(c.r.PathValue("n")), c.text("body"))} })
		on("PATCH "+repo+"/issues/comments/{n}", 200, func(c call) any { return edit(number(c.r.PathValue("n")), c.text("body")) })
		on("POST "+repo+"/deployments", 201, func(c call) any {
			id := next()
			f.deployments[id] = "new"
			return m{"id": id, "sha": c.text("ref")}
		})
		on("POST "+repo+"/deployments/{n}/statuses", 201, func(c call) any {
			f.deployments[number(c.r.PathValue("n"))] = c.text("state")
			return m{"id": next(), "state": c.text("state")}
		})
	}

	lab := "/api/v4/projects/{id}"
	on("GET "+lab, 200, func(c call) any {
		name := c.r.PathValue("id")
		vis := "public"
		if f.private[name] {
			vis = "private"
		}
		return m{"path_with_namespace": name, "default_branch": "main", "visibility": vis}
	})
	on("POST "+lab+"/statuses/{sha}", 201, func(c call) any {
		return status(c.r.PathValue("sha"), c.text("name"), c.text("state"), c.text("target_url"), c.text("description"))
	})
	on("POST "+lab+"/hooks", 201, func(c call) any { return m{"id": hook(c.text("url"), c.text("token"))} })
	on("DELETE "+lab+"/hooks/{n}", 204, unhook)
	on("POST "+lab+"/deploy_keys", 201, func(c call) any { return m{"id": key(c.text("key"))} })
	on("DELETE "+lab+"/deploy_keys/{n}", 204, unkey)
	on("POST "+lab+"/merge_requests/{n}/notes", 201, func(c call) any { return m{"id": comment(number(c.r.PathValue("n")), c.text("body"))} })
	on("PUT "+lab+"/merge_requests/{mr}/notes/{n}", 200, func(c call) any { return edit(number(c.r.PathValue("n")), c.text("body")) })
	on("POST "+lab+"/deployments", 201, func(c call) any {
		id := next()
		f.deployments[id] = c.text("status")
		return m{"id": id}
	})
	on("PUT "+lab+"/deployments/{n}", 200, func(c call) any {
		id := number(c.r.PathValue("n"))
		if f.deployments[id] == "" {
			return nil
		}
		f.deployments[id] = c.text("status")
		return m{"id": id}
	})

	dc := "/rest/api/1.0/projects/{owner}/repos/{name}"
	on("GET "+dc, 200, func(c call) any {
		return m{"slug": c.r.PathValue("name"), "public": !f.private[c.r.PathValue("owner")+"/"+c.r.PathValue("name")], "project": m{"key": c.r.PathValue("owner")}}
	})
	on("GET "+dc+"/default-branch", 200, func(call) any { return m{"displayId": "main"} })
	on("POST "+dc+"/commits/{sha}/builds", 204, func(c call) any {
		status(c.r.PathValue("sha"), c.text("name"), c.text("state"), c.text("url"), c.text("description"))
		return m{}
	})
	on("POST "+dc+"/webhooks", 201, func(c call) any { return m{"id": hook(c.text("url"), c.text("configuration", "secret"))} })
	on("DELETE "+dc+"/webhooks/{n}", 204, unhook)
	on("POST /rest/keys/1.0/projects/{owner}/repos/{name}/ssh", 201, func(c call) any { return m{"key": m{"id": key(c.text("key", "text"))}} })
	on("DELETE /rest/keys/1.0/projects/{owner}/repos/{name}/ssh/{n}", 204, unkey)
	on("POST "+dc+"/pull-requests/{mr}/comments", 201, func(c call) any { return m{"id": comment(number(c.r.PathValue("mr")), c.text("text"))} })
	on("GET "+dc+"/pull-requests/{mr}/comments/{n}", 200, func(c call) any {
		if x := f.comments[number(c.r.PathValue("n"))]; x != nil {
			return m{"id": number(c.r.PathValue("n")), "version": x.Edits, "text": x.Text}
		}
		return nil
	})
	on("PUT "+dc+"/pull-requests/{mr}/comments/{n}", 200, func(c call) any {
		x := f.comments[number(c.r.PathValue("n"))]
		if v, _ := c.body["version"].(float64); x == nil || int(v) != x.Edits {
			return nil
		}
		return edit(number(c.r.PathValue("n")), c.text("text"))
	})

	cloud := "/api/2.0/repositories/{owner}/{name}"
	on("GET "+cloud, 200, func(c call) any {
		name := c.r.PathValue("owner") + "/" + c.r.PathValue("name")
		return m{"full_name": name, "is_private": f.private[name], "mainbranch": m{"name": "main"}}
	})
	on("POST "+cloud+"/commit/{sha}/statuses/build", 201, func(c call) any {
		return status(c.r.PathValue("sha"), c.text("name"), c.text("state"), c.text("url"), c.text("description"))
	})
	on("POST "+cloud+"/hooks", 201, func(c call) any {
		hook(c.text("url"), c.text("secret"))
		return m{"uuid": fmt.Sprint(f.last)}
	})
	on("DELETE "+cloud+"/hooks/{n}", 204, unhook)
	on("POST "+cloud+"/deploy-keys", 200, func(c call) any { return m{"id": key(c.text("key"))} })
	on("DELETE "+cloud+"/deploy-keys/{n}", 204, unkey)
	on("POST "+cloud+"/pullrequests/{mr}/comments", 201, func(c call) any { return m{"id": comment(number(c.r.PathValue("mr")), c.text("content", "raw"))} })
	on("PUT "+cloud+"/pullrequests/{mr}/comments/{n}", 200, func(c call) any { return edit(number(c.r.PathValue("n")), c.text("content", "raw")) })
}
